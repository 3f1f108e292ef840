"""What a comparison is asked for, checked before the work: recipe, methods, evaluator, room."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mergekit import merge_methods
from mergekit.config import MergeConfiguration

from cart_plugin.compare.steps import MODEL, Comparison, needed_bytes
from cart_plugin.compare.variants import absolute, parse_assignment, variants
from cart_plugin.doctor.inputs import check_split
from cart_plugin.doctor.layout import places, references
from cart_plugin.doctor.machine import size
from cart_plugin.doctor.parameters import did_you_mean
from cart_plugin.doctor.recipe import load
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import read_config, read_inputs, stop_at


def names(text: str) -> list[str]:
    """The names of a list with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def evaluator_request(
    tasks: str | None, evaluator: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The evaluator as `cart_plugin.compare.judge` takes it.

    Args:
        tasks: lm-eval's, with commas between.
        evaluator: `module:function` in the place of lm-eval.
        options: lm-eval's, by the names of `mergekit-cart compare`.

    Raises:
        CartError: neither or both are given, or an option is of no use.
    """
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    if (tasks is None) == (evaluator is None):
        raise CartError("give either --tasks (for lm-eval) or --evaluator MODULE:FUNCTION")
    if evaluator is not None:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise CartError(f"{flag} is an option of lm-eval, which --evaluator replaces")
        return {"kind": "function", "name": evaluator}
    include, dtype = given.pop("include_path", None), given.pop("dtype", None)
    if include is not None and not include.is_dir():
        raise CartError(f"--include-path {include} is not a folder")
    if str(given.get("batch_size", "")).isdigit():
        given["batch_size"] = int(given["batch_size"])
    if given.get("limit") == 0:
        raise CartError("--limit is 0")
    if not names(tasks or ""):
        raise CartError("--tasks names no task")
    return {
        "kind": "lm-eval",
        "tasks": names(tasks or ""),
        "include_path": None if include is None else str(include.resolve()),
        "model_args": {} if dtype is None else {"dtype": dtype},
        "options": given,
    }


def comparison_of(
    recipe: Path,
    methods: list[str],
    fixed: tuple[str, ...],
    grids: tuple[str, ...],
    request: dict[str, Any],
    out: Path,
    keep: Any,
    options: tuple[str, ...],
    also: tuple[Path, ...] = (),
) -> Comparison:
    """The comparison that a command asks for.

    Args:
        recipe: the YAML file.
        methods: mergekit's names of them.
        fixed: `METHOD.PARAMETER=VALUE`, in the place of the recipe's.
        grids: `METHOD.PARAMETER=VALUE,VALUE`, a row for each.
        request: from `evaluator_request`.
        out: folder of the results.
        keep: which merged models stay: none, best or all.
        options: of mergekit's command line.
        also: folders of models to judge as they are.

    Raises:
        CartError: the recipe or its models cannot be merged, or an assignment is none.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise CartError(f"{missing[0]} is not installed: pip install 'cart-plugin[compare]'")
    documents, findings = load(recipe)
    if findings:
        raise CartError(f"{recipe}: {findings[0].fact}; {findings[0].advice}")
    if len(documents) > 1:
        raise CartError(f"{recipe} holds several recipes; compare takes one")
    own = documents[0].get("merge_method")
    config = read_config({**documents[0], "merge_method": own or "linear"})
    for label, model in references(config).items():
        stop_at(check_split(label, model))
    document = absolute(config)
    inputs = read_inputs(document)
    _check_parameters(inputs.config)
    rows = variants(
        {**document, "merge_method": own},
        methods,
        [parse_assignment(text, single=True) for text in fixed],
        [parse_assignment(text, single=False) for text in grids],
    )
    if not rows:
        raise CartError("--methods names no method")
    for number, folder in enumerate(also):
        if not (folder / "config.json").is_file():
            raise CartError(f"--also {folder} is no model's folder: it has no config.json")
        if folder.resolve() in [other.resolve() for other in also[:number]]:
            raise CartError(f"--also {folder} is given twice")
    return Comparison(inputs, rows, request, out, keep, options, also)


def _check_parameters(config: MergeConfiguration) -> None:
    """Refuse parameters that no method has: each leaves out what another one's are for.

    Raises:
        CartError: there is one.
    """
    methods = merge_methods.registered_methods()
    known = sorted({spec.name for method in methods for spec in method.spec.parameters})
    for place in places(config):
        for name in place.settings:
            if name not in known:
                hint = did_you_mean(name, known) or "delete it"
                raise CartError(f"{place.name(name)}: no method has such a parameter; {hint}")


def locked(out: Path) -> FileLock:
    """Hold an output folder: two comparisons in one would remove each other's models.

    Raises:
        CartError: another one holds it.
    """
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CartError(f"another comparison is at work in {out}; name another folder") from None
    return lock


def check_inputs(comparison: Comparison) -> None:
    """Refuse models that an earlier comparison left where this one removes its own."""
    made = {(comparison.out / variant.name / MODEL).resolve() for variant in comparison.variants}
    used = {label: checkpoint.path for label, checkpoint in comparison.inputs.checkpoints.items()}
    for label, path in (used | {str(folder): folder for folder in comparison.also}).items():
        if path.resolve() in made:
            raise CartError(
                f"model {label} lies where this comparison would write; name another folder (--out)"
            )


def check_disk(comparison: Comparison) -> None:
    """Refuse to start what the disk cannot hold."""
    place = comparison.out.absolute()
    while not place.exists():
        place = place.parent
    needed, free = needed_bytes(comparison), shutil.disk_usage(place).free
    if needed > free:
        raise CartError(
            f"{place} has {size(free)} free and {size(needed)} are needed; keep fewer models "
            "(--keep-models none) or name another folder"
        )
