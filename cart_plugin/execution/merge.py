"""One recipe merged whole: tensors, everything that belongs to the model, and a check of both.

`mergekit-yaml` does it where its architecture support is whole. mergekit 0.1.5 cannot plan bare
encoders (`BertModel`, `CLIPModel`) and leaves out tensors of others without a word (DINOv2, ViT):
then the same recipe is merged tensor by tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from cart_plugin.checkpoints import recipes, side_files
from cart_plugin.checkpoints.files import check_space, read_json
from cart_plugin.errors import CartError
from cart_plugin.execution import adapters, child, completion, routes, verification
from cart_plugin.execution.inputs import Inputs, read_inputs


@dataclass(frozen=True)
class Outcome:
    """A finished merge.

    Attributes:
        route: the name of the way it went.
        reason: why that one.
        tensors: how many were written.
        warnings: what the merge has warned of.
    """

    route: str
    reason: str
    tensors: int
    warnings: Sequence[str] = ()

    @property
    def note(self) -> str:
        """Why the merge went tensor by tensor; empty if mergekit's plan was followed."""
        return self.reason if self.route == routes.TENSORWISE else ""


@dataclass(frozen=True)
class Prepared:
    """A recipe that can be merged.

    Attributes:
        source: its text.
        original: its models, as it names them.
        inputs: the same, with whole models in the place of adapters.
        choice: the way to merge them.
    """

    source: str
    original: Inputs
    inputs: Inputs
    choice: routes.Choice


def merge(
    recipe: Path,
    out: Path,
    options: MergeOptions,
    *,
    log: Path,
    scratch: Path,
    name: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Outcome:
    """Merge a recipe into a folder that is nobody's yet: what fails leaves a part of it behind.

    Args:
        recipe: the YAML file, of one recipe.
        out: the folder.
        options: mergekit's.
        log: receives mergekit's output.
        scratch: a folder for the time of the merge; whole models of adapters lie there, unless
            the options name a cache.
        name: the model's, for its card; the folder's if None.
        force: go on where the doctor finds a problem in mergekit's plan.
        tell: receives the last line of the log while it grows.

    Raises:
        CartError: no route makes a whole model, the disk has no room for it, mergekit failed, or
            the result is not whole; or weights that follow the transformer
            (`side_files.check_modules`) would not be merged.
    """
    prepared = prepare(recipe, options, scratch, force=force, tell=tell)
    choice = prepared.choice
    out.mkdir(exist_ok=True)
    check_space(out, choice.bytes)
    job = scratch / "job.json"
    routes.Job.of(choice, prepared.inputs, out, options).write(job)
    error = child.run("cart_plugin.execution.routes:main", [str(job)], log, tell)
    job.unlink()
    if error:
        raise CartError(f"mergekit failed: {error}")
    warnings = read_json(routes.warnings_file(job))["warnings"]
    routes.warnings_file(job).unlink()
    written = complete(prepared, out, name or out.name, options)
    shutil.rmtree(scratch / "fused", ignore_errors=True)
    return Outcome(choice.route, choice.reason, written, warnings)


def prepare(
    recipe: Path,
    options: MergeOptions,
    scratch: Path,
    *,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Prepared:
    """Read a recipe, make its models whole, and choose a way; arguments and errors of `merge`."""
    source = recipe.read_text(encoding="utf-8")
    original = read_inputs(recipes.read(source))
    inputs = original
    if original.adapters:
        inputs = read_inputs(adapters.fuse(original, options, scratch, tell))
    side_files.check_modules(inputs.donor.path, [held.path for held in inputs.checkpoints.values()])
    return Prepared(source, original, inputs, routes.choose(inputs, options, force=force))


def complete(
    prepared: Prepared,
    out: Path,
    name: str,
    options: MergeOptions,
    suspects: Collection[str] | None = None,
) -> int:
    """Add what belongs to the model, and check all of it.

    Args:
        prepared: the recipe.
        out: the folder of merged weights and mergekit's config.
        name: the model's, for its card.
        options: mergekit's.
        suspects: as `verification.verify` has them.

    Returns:
        The number of its tensors.

    Raises:
        CartError: it is no whole model.
    """
    inputs = prepared.inputs
    completion.add_side_files(out, inputs.donor.path, inputs.config, options)
    completion.renumber_tokens(out, inputs.donor.path, inputs.config, options)
    written = verification.read_result(out)
    completion.correct_config(written)
    verification.verify(written, inputs, suspects)
    if options.write_model_card:
        completion.add_card(out, name, prepared.original.config, prepared.source)
    return len(written.tensors)
