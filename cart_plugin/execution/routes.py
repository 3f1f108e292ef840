"""The ways to merge a recipe's tensors, and which of them a recipe takes.

A route takes a job and writes weights: it runs in a process of its own (`main`), with mergekit's
executors. Each is a function of one signature.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit import merge as mergekit_merge
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.files import read_json, write_json
from cart_plugin.checkpoints.placement import computed, is_computed
from cart_plugin.doctor import costs, planning, result, slices
from cart_plugin.doctor.buffers import differing
from cart_plugin.doctor.merges import Merge, match
from cart_plugin.doctor.parameters import check_method
from cart_plugin.errors import CartError, CartWarning, first_line
from cart_plugin.execution import outlook, tensorwise
from cart_plugin.execution.inputs import Inputs, OrderedConfiguration, plain, read_inputs, stop_at
from cart_plugin.execution.layout import check_described, donor_model, left_out, place
from cart_plugin.wording import count, some


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
    """A route, and why: a clause that follows "merged tensor by tensor" or its like.

    Attributes:
        route: its name in `ROUTES`.
        reason: the clause.
        bytes: of the result, about.
    """

    route: str
    reason: str
    bytes: int = 0


Make = Callable[..., Any]
"""Makes an executor, with the arguments of mergekit's."""


def by_plan(job: Job, options: MergeOptions, make: Make = Executor) -> None:
    """Merge as `mergekit-yaml` does, from its knowledge of the architecture.

    Args:
        job: what to do.
        options: mergekit's.
        make: what runs the tasks, instead of mergekit's executor.
    """
    with _layers_of_slices(), _executor(make):
        mergekit_merge.run_merge(OrderedConfiguration.model_validate(job.recipe), job.out, options)


@contextmanager
def _executor(make: Make) -> Iterator[None]:
    """Let another executor run mergekit's tasks: `run_merge` takes its own and no other."""
    theirs = mergekit_merge.Executor
    mergekit_merge.Executor = make
    try:
        yield
    finally:
        mergekit_merge.Executor = theirs


@contextmanager
def _layers_of_slices() -> Iterator[None]:
    """Let the result's config say of each layer what the slices take.

    mergekit 0.1.5 sets the number of layers only (`_model_out_config`), and stops at the end of a
    merge where `layer_types` has another length: of slices of Qwen2, Qwen3, Gemma 2 and others.
    """
    theirs = mergekit_merge._model_out_config

    def ours(config: MergeConfiguration, architecture: Any, trust_remote_code: bool = False) -> Any:
        found = theirs(config, architecture, trust_remote_code=trust_remote_code)
        lists = slices.layer_lists(
            config, architecture, lambda model: model.config(trust_remote_code=trust_remote_code)
        )
        for entry in lists:
            entry.write(found)
        return found

    mergekit_merge._model_out_config = ours
    try:
        yield
    finally:
        mergekit_merge._model_out_config = theirs


def by_tensor(job: Job, options: MergeOptions, make: Make = Executor) -> None:
    """Merge the tensors that all models share one by one; arguments as of `by_plan`."""
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
        executor = make(targets=tasks, math_device=options.device, storage_device=storage)
    for _ in executor.run(quiet=options.quiet):
        pass


PLAN, TENSORWISE = "plan", "tensorwise"
ROUTES: Mapping[str, Callable[..., None]] = {PLAN: by_plan, TENSORWISE: by_tensor}
"""The routes by name."""


def warnings_file(job: Path) -> Path:
    """Where `main` leaves the `warnings` of a merge that went well, beside the job's file."""
    return job.with_name("warnings.json")


def main() -> None:
    """Do the job whose file the command line names."""
    from cart_plugin.mergekit import register

    register()
    file = Path(sys.argv[1])
    job = Job(**read_json(file))
    options = MergeOptions(**job.options)
    options.apply_global_options()
    try:
        with recorded() as told:
            ROUTES[job.route](job, options)
    except Exception as error:
        logging.getLogger(__name__).info("the merge failed", exc_info=True)  # with -v
        raise SystemExit(
            str(error) if isinstance(error, CartError) else first_line(error)
        ) from None
    write_json(warnings_file(file), {"warnings": list(dict.fromkeys(told))})


@contextmanager
def recorded() -> Iterator[list[str]]:
    """A list that this package's warnings go to, of all threads, beside being printed."""
    told: list[str] = []
    printed = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, CartWarning):
            told.append(str(message))
        printed(message, category, *rest, **named)

    warnings.showwarning = show
    try:
        yield told
    finally:
        warnings.showwarning = printed


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
        try:
            names.model_class(inputs.donor.config, inputs.donor.name)
        except CartError as error:
            if "auto_map" not in inputs.donor.config:
                raise
            raise CartError(f"{error}, but for --trust-remote-code, which runs it") from None
    plan, findings = planning.plan(inputs.config, inputs.checkpoints, options)
    planned = None
    if plan is None:
        loss = findings[0].fact
    else:
        merges = match(plan, inputs.checkpoints)
        if not force:
            _stop_at_problems(merges, inputs, options)
        losses = (_left_out, _cast, _differing)
        found = (of(merges, inputs) for of in losses)
        loss = _lacking(merges) or next(filter(None, found), "")
        if not loss:
            held = [merge for merge in merges if merge.inputs]
            size = costs.result_bytes(held, inputs.config)
            planned = Choice(PLAN, f"it keeps all tensors ({len(held):,} planned)", size)
            loss = _masks(merges, inputs)
            if not loss:
                return planned
    try:
        model, placed = tensorwise.check(inputs)
        foreseen = outlook.foresee(inputs, model, placed)
        ahead = outlook.check(inputs, foreseen)
    except CartError as error:
        if planned is not None:
            return planned  # most methods leave a mask as it is
        raise CartError(f"{loss}; tensor by tensor: {error}") from None
    if not force:
        stop_at(ahead)
    if outside := left_out(placed):
        tensors = f"{count(len(outside), 'tensor')} ({some(outside)})"
        loss += (
            f"; left out: {tensors} that {type(model).__name__} does not use and some models lack"
        )
    return Choice(TENSORWISE, loss, costs.result_bytes(foreseen, inputs.config))


def _stop_at_problems(merges: list[Merge], inputs: Inputs, options: MergeOptions) -> None:
    method, findings = check_method(inputs.config.merge_method)
    if method is not None:
        findings = result.check_plan(
            merges,
            inputs.checkpoints,
            inputs.config,
            method,
            completed=True,
            truncates=options.unsafe_truncate_embeddings,
        )
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


def _differing(merges: list[Merge], inputs: Inputs) -> str:
    """Which integers mergekit's merge would stop at: counters differ in all fine-tuned models."""
    found = differing(merges, inputs.checkpoints)
    if not found:
        return ""
    tensors = count(len(found), "integer tensor")
    return f"mergekit stops at {tensors} ({some(found)}), in which the models differ"


def _masks(merges: list[Merge], inputs: Inputs) -> str:
    """Which masks and tables mergekit's plan would merge like weights: TIES makes infinity NaN."""
    label = inputs.donor.name
    found = {
        name: merge.planned.name
        for merge in merges
        for name in merge.planned.sources.get(label, ())
        if label in merge.inputs and is_computed(name, merge.inputs[label]) and merge.is_floating
    }
    masks = [found[name] for name in computed(inputs.donor) if name in found] if found else []
    if not masks:
        return ""
    tensors = count(len(masks), "tensor")
    return f"mergekit's plan would merge {tensors} ({some(masks)}) that the model computes anew"
