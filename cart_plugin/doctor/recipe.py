"""Checks of a mergekit recipe, before hours are spent on it: will it run, will it do what it says?

From the outside in: YAML, form, settings, the models' files, and mergekit's own plan of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

from cart_plugin.checkpoints import recipes
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import (
    adapters,
    costs,
    described,
    likeness,
    merges,
    output,
    parameters,
    planning,
    result,
    saved,
    schema,
    slices,
    tokenizer,
    whole,
)
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor.findings import Finding, Level, Section, ok, problem, warning
from cart_plugin.doctor.layout import Recipe, check_ranges, references
from cart_plugin.errors import CheckpointError, first_line


def check_recipe(
    path: Path,
    out: Path | None,
    show: Callable[[Section], None],
    *,
    options: MergeOptions | None = None,
) -> None:
    """Check a recipe file, showing each section as it is ready.

    Args:
        path: the YAML file, with one recipe or several (for mergekit-multi).
        out: folder of the result, for the room on its file system; the current one if None.
        show: receives the sections.
        options: of `mergekit-cart merge`, which fuses adapters and completes what mergekit writes;
            None for a merge by mergekit's own commands.
    """
    title = f"Recipe {path}"
    documents, findings = load(path)
    if findings:
        show(Section(title, findings))
        return
    if len(documents) == 1:
        _check_document(documents[0], title, set(), out, show, options)
        return
    show(Section(title, [_check_names(documents)]))
    made = {str(document["name"]) for document in documents if "name" in document}
    for number, document in enumerate(documents, start=1):
        part = f"Recipe {number} of {len(documents)}: {document.get('name', 'the final merge')}"
        _check_document(document, part, made, out, show, options)


def example_recipes() -> Path:
    """The folder of the recipes that people copy: wheels carry it, clones have it at their top."""
    package = Path(__file__).parents[1]
    carried = package / "configs" / "mergekit"
    return carried if carried.is_dir() else package.parent / "configs" / "mergekit"


def load(path: Path) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Read a YAML file of one recipe or several; none, and the reason, if it is no such file."""
    try:
        documents = recipes.read_all(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        return [], [problem(f"cannot be read: {first_line(error)}", "name a YAML file")]
    except CheckpointError as error:
        return [], [problem(error.fact, error.advice)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        what = getattr(error, "problem", None) or first_line(error)
        return [], [problem(f"not valid YAML: {line}{what}", "correct it; mind the indentation")]
    if not documents or not all(isinstance(document, dict) for document in documents):
        return [], [
            problem(
                "not a recipe: it must be a mapping with `merge_method:` and `models:`",
                f"start from one of the recipes in {example_recipes()}",
            )
        ]
    return documents, []


def _check_names(documents: list[dict[str, Any]]) -> Finding:
    names = [document.get("name") for document in documents]
    if len(set(names)) < len(names):
        return problem(
            "two recipes of the file share a name, or two have none",
            "give each a `name:` of its own; only the final merge may go without",
        )
    return ok(f"{len(documents)} recipes, for mergekit-multi --intermediate-dir FOLDER")


def _check_document(
    document: dict[str, Any],
    title: str,
    made: set[str],
    out: Path | None,
    show: Callable[[Section], None],
    options: MergeOptions | None,
) -> None:
    """Check one recipe as far as it goes; `made` are the names of the file's other recipes."""
    completed = options is not None  # by `mergekit-cart merge`, in what mergekit leaves out
    kind = schema.recipe_class(document)
    method, findings = parameters.check_method(document.get("merge_method"))
    known = {spec.name for spec in method.spec.parameters} if method is not None else set()
    findings += schema.check_keys(document, kind, known)
    config, rejected = schema.parse(document, kind)
    findings += rejected
    if config is None or method is None:
        show(Section(title, findings))
        return
    findings += schema.check_dtypes(config)
    findings += parameters.check_settings(config, method)
    findings += parameters.check_groups(config, method)
    if not findings:
        command = "mergekit-pytorch" if kind is RawPyTorchMergeConfig else "mergekit-yaml"
        findings = [ok(f"valid for {command}, merge_method {method.spec.name}")]
    show(Section(title, findings))
    stopped = _has_problem(findings)

    in_the_way = [] if out is None else output.check_out(out, config)
    if completed:  # then nothing is written over
        in_the_way = [finding for finding in in_the_way if finding.level is Level.PROBLEM]
    if in_the_way:
        show(Section("Output", in_the_way))
    checkpoints, findings = _read_inputs(config, made, completed=completed)
    if not completed:
        findings += adapters.check_cache(config)
    findings += tokenizer.check_tokenizer(config, made, checkpoints, completed=completed)
    stopped = stopped or _has_problem(findings)
    show(Section("Inputs", findings))
    if checkpoints is None:
        return
    wrong = check_ranges(config, checkpoints)
    if wrong := wrong or list(described.check(checkpoints, config, completed=completed)):
        show(Section("Result", wrong))
        return
    plan, findings = planning.plan(config, checkpoints, options)
    if plan is None and stopped:
        findings = [
            warning("mergekit cannot plan the merge as it is", "solve the problems above first")
        ]
    if plan is None:
        findings += likeness.check(checkpoints, config, completed=completed)
    else:
        matched = merges.match(plan, checkpoints)
        truncates = options is not None and options.unsafe_truncate_embeddings
        findings = result.check_plan(
            matched, checkpoints, config, method, completed=completed, truncates=truncates
        )
        held = [merge for merge in matched if merge.inputs]
        if parameters.is_cart(method) and not _has_problem(findings):
            findings += whole.check_rules(held, config)
        findings += saved.check_saved(held, checkpoints, config, completed=completed)
        if not completed:  # else our merge writes them
            findings += slices.check(checkpoints, config)
        # What a merge that fails would need is of no use.
        if not stopped and not _has_problem(findings):
            if parameters.is_cart(method):  # others need other amounts
                findings += costs.check_memory(matched, checkpoints, config, options)
            findings += costs.check_disk(matched, checkpoints, config, out, options)
    show(Section("Result", findings))


def _read_inputs(
    config: Recipe, made: set[str], *, completed: bool
) -> tuple[Mapping[str, Checkpoint] | None, list[Finding]]:
    """Find and read the models of a recipe; None for them if not all could be read."""
    checkpoints: dict[str, Checkpoint] = {}
    findings: list[Finding] = []
    complete = True
    for label, model in references(config).items():
        if model.model.path in made:
            findings.append(ok(f"model {label} is made by another recipe of this file"))
            complete = False
            continue
        split = files.check_split(label, model)
        place = model.model
        path, located = (
            (None, split) if split else files.locate(place.path, "model", place.revision)
        )
        findings += located
        if path is None:
            complete = False
            continue
        if isinstance(config, RawPyTorchMergeConfig):
            checkpoint, unreadable = files.read_file(label, path)
        else:
            checkpoint, unreadable = files.read_folder(label, path)
            # `mergekit-cart merge` writes the card itself.
            findings += [] if completed else files.check_model_card(place.path)
        unreadable += files.check_dtypes(checkpoint)
        if model.lora is not None:
            odd = files.check_adapter(model.lora.path, model.lora.revision)
            if not odd and not unreadable:
                odd = adapters.check_fit(Path(model.lora.path), model.lora.path, checkpoint)
            findings += [finding for finding in odd if finding.level is not Level.PROBLEM]
            unreadable += [finding for finding in odd if finding.level is Level.PROBLEM]
        findings += unreadable or [files.summary(checkpoint), *files.check_format(checkpoint)]
        complete = complete and not unreadable
        checkpoints[label] = checkpoint
    return checkpoints if complete else None, findings


def _has_problem(findings: list[Finding]) -> bool:
    return any(finding.level is Level.PROBLEM for finding in findings)
