"""The ways to merge a recipe's tensors, and which of them a recipe takes.

A route takes a job and writes weights: it runs in a process of its own (`main`), with mergekit's
executors. Each is a function of one signature.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.files import read_json, write_json
from cart_plugin.doctor import planning, result
from cart_plugin.doctor.findings import count, some
from cart_plugin.doctor.merges import Merge, match
from cart_plugin.doctor.parameters import check_method
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution import outlook, tensorwise
from cart_plugin.execution.inputs import Inputs, OrderedConfiguration, plain, read_inputs, stop_at
from cart_plugin.execution.layout import check_described, donor_model, place


@dataclass(frozen=True)
class Job:
    """What a route has to do.

    Attributes:
        route: its name in `ROUTES`.
        recipe: mergekit's, as plain data; its models are local folders.
        out: the folder to write.
        options: mergekit's, as plain data.
    """

    route: str
    recipe: Mapping[str, Any]
    out: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, choice: Choice, inputs: Inputs, out: Path, options: MergeOptions) -> Job:
        """The job of a recipe's merge by the chosen route."""
        # What is copied, and the card with the folder's final name, come afterwards.
        copies = options.copy_tokenizer and bool(inputs.config.chat_template)
        settings = {**options.model_dump(), "write_model_card": False, "copy_tokenizer": copies}
        return cls(choice.route, plain(inputs.config), str(out), settings)

    def write(self, file: Path) -> None:
        """Store it for `main`."""
        write_json(file, vars(self))


@dataclass(frozen=True)
class Choice:
    """A route, and why: a clause that follows "merged tensor by tensor" or its like."""

    route: str
    reason: str


def by_plan(job: Job, options: MergeOptions) -> None:
    """Merge as `mergekit-yaml` does, from its knowledge of the architecture."""
    run_merge(OrderedConfiguration.model_validate(job.recipe), job.out, options)


def by_tensor(job: Job, options: MergeOptions) -> None:
    """Merge the tensors that all models share one by one, whatever the architecture."""
    if options.random_seed is not None:
        from transformers import set_seed

        set_seed(options.random_seed)
    tasks = tensorwise.tasks(read_inputs(job.recipe), Path(job.out), options)
    executor: Any
    if options.multi_gpu:
        storage = None if options.low_cpu_memory else "cpu"
        executor = MultiGPUExecutor(targets=tasks, storage_device=storage)
    else:
        storage = options.device if options.low_cpu_memory else "cpu"
        executor = Executor(targets=tasks, math_device=options.device, storage_device=storage)
    for _ in executor.run(quiet=options.quiet):
        pass


PLAN, TENSORWISE = "plan", "tensorwise"
ROUTES: Mapping[str, Callable[[Job, MergeOptions], None]] = {PLAN: by_plan, TENSORWISE: by_tensor}
"""The routes by name."""


def main() -> None:
    """Do the job whose file the command line names."""
    from cart_plugin.mergekit import register

    register()
    job = Job(**read_json(Path(sys.argv[1])))
    options = MergeOptions(**job.options)
    options.apply_global_options()
    try:
        ROUTES[job.route](job, options)
    except Exception as error:
        logging.getLogger(__name__).info("the merge failed", exc_info=True)  # with -v
        raise SystemExit(
            str(error) if isinstance(error, CartError) else first_line(error)
        ) from None


def choose(inputs: Inputs, options: MergeOptions, *, force: bool = False) -> Choice:
    """The route that makes a whole model: mergekit's plan if it does.

    Args:
        inputs: the recipe and its models, all of them whole.
        options: mergekit's.
        force: go on where the doctor finds a problem in the plan.

    Raises:
        CartError: neither can, the doctor finds a problem, or the model brings its own code, which
            runs with `trust_remote_code` only; the message says why.
    """
    if not options.trust_remote_code:
        names.model_class(inputs.donor.config, inputs.donor.name)
    plan, findings = planning.plan(inputs.config, inputs.checkpoints, options)
    if plan is None:
        loss = findings[0].fact
    else:
        merges = match(plan, inputs.checkpoints)
        if not force:
            _stop_at_problems(merges, inputs)
        loss = _lacking(merges) or _left_out(merges, inputs) or _cast(merges, inputs)
        if not loss:
            number = sum(1 for merge in merges if merge.inputs)
            return Choice(PLAN, f"it keeps all tensors ({number:,} planned)")
    try:
        found = outlook.check(inputs)
    except CartError as error:
        raise CartError(f"{loss}; tensor by tensor: {error}") from None
    if not force:
        stop_at(found)
    return Choice(TENSORWISE, loss)


def _stop_at_problems(merges: list[Merge], inputs: Inputs) -> None:
    method, findings = check_method(inputs.config.merge_method)
    if method is not None:
        findings = result.check_plan(merges, inputs.checkpoints, inputs.config, method)
    stop_at(finding for finding in findings if not finding.of_architecture)


def _lacking(merges: list[Merge]) -> str:
    """Why mergekit's merge would stop at tensors that inputs lack."""
    found = [merge for merge in merges if merge.lacking and not merge.planned.optional]
    if not found:
        return ""
    tensors = some(merge.planned.name for merge in found)
    who = some(dict.fromkeys(label for merge in found for label in merge.lacking), 1)
    return f"mergekit's plan needs {count(len(found), 'tensor')} ({tensors}) that {who} lacks"


def _left_out(merges: list[Merge], inputs: Inputs) -> str:
    """Which of the model's tensors mergekit's plan would leave out without a word.

    Raises:
        CartError: the weights are not of the config's model.
    """
    if not inputs.config.models:
        return ""  # of slices and modules, the recipe decides what is taken
    try:
        model = donor_model(inputs)
    except CartError:
        return ""  # a model that brings its own code: the doctor compares names
    label = inputs.donor.name
    held = place(model, inputs.donor)
    check_described(model, held)
    planned = {
        merge.planned.name: merge.inputs[label].shape for merge in merges if label in merge.inputs
    }
    covered = {name for unit in names.one_way(model, planned) for name in unit.targets}
    lost = [name for name in held.shapes if name not in covered and name not in held.unused]
    if not lost:
        return ""
    return (
        f"mergekit's plan would silently drop {len(lost):,} of {len(held.shapes):,} tensors "
        f"({some(lost)})"
    )


def _cast(merges: list[Merge], inputs: Inputs) -> str:
    """Which integers mergekit's plan would turn into floats: it casts whatever it loads."""
    if inputs.config.dtype is None and inputs.config.out_dtype is None:
        return ""
    found = [
        merge.planned.name
        for merge in merges
        if any(
            info.dtype is not None and not info.dtype.is_floating_point
            for info in merge.inputs.values()
        )
    ]
    if not found:
        return ""
    return f"mergekit's plan would cast {count(len(found), 'integer tensor')} ({some(found)})"
