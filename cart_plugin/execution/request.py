"""What `mergekit-cart merge` is asked for: the doctor's word, and the merge into a new folder."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mergekit.options import MergeOptions

from cart_plugin.checkpoints.files import unfinished
from cart_plugin.doctor import advice
from cart_plugin.doctor.findings import Finding, Level, Section, problem
from cart_plugin.doctor.recipe import check_recipe, load
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution import merge, outlook, tensorwise
from cart_plugin.execution.inputs import Inputs, read_inputs

_WORK = ".merging"  # in the unfinished folder: log, and models for the time of the merge


def examine(
    recipe: Path, out: Path, show: Callable[[Section], None], options: MergeOptions | None = None
) -> list[Finding]:
    """Let the doctor look at a recipe.

    What is only mergekit's support of an architecture is a warning here if the tensors can be
    merged one by one.

    Args:
        recipe: the YAML file.
        out: folder of the result.
        show: receives the findings.
        options: mergekit's; its defaults if None.

    Returns:
        The problems.
    """
    problems: list[Finding] = []
    facts: set[str] = set()
    other_way = functools.cache(lambda: _other_way(recipe))

    def see(section: Section) -> None:
        findings = list(section.findings)
        if any(finding.of_architecture for finding in findings):
            found, obstacle = other_way()
            findings = [_as_warning(entry, obstacle) for entry in findings]
            known = facts.union(entry.fact for entry in findings)
            findings += [entry for entry in found if entry.fact not in known]
        facts.update(finding.fact for finding in findings)
        problems.extend(finding for finding in findings if finding.level is Level.PROBLEM)
        show(Section(section.title, findings))

    try:
        check_recipe(recipe, out, see, options=options)
    except Exception as error:  # whatever is wrong with a recipe, its author gets no traceback
        report = "please report this with the recipe; with --force the merge may still work"
        see(
            Section(
                "Not checked further", [problem(f"the check failed: {first_line(error)}", report)]
            )
        )
    return problems


def _other_way(recipe: Path) -> tuple[list[Finding], str]:
    """What the doctor has to say of a merge tensor by tensor; or why there can be none."""
    documents, _ = load(recipe)
    try:
        inputs = read_inputs(documents[0])
        merges = outlook.foresee(inputs, *tensorwise.check(inputs))
        return outlook.check(inputs, merges), ""
    except CartError as error:
        return [], str(error)


def _as_warning(finding: Finding, obstacle: str) -> Finding:
    """A finding about mergekit's plan, where there is another way; its own advice where not."""
    if not finding.of_architecture:
        return finding
    if not obstacle:
        return replace(finding, level=Level.WARNING, advice="merged tensor by tensor instead")
    return replace(finding, advice=advice.here(finding.advice, obstacle))


def run(
    recipe: Path,
    out: Path,
    options: MergeOptions,
    *,
    force: bool,
    tell: Callable[[str], None],
    log: Callable[[str], None],
) -> merge.Outcome:
    """Merge a recipe into a folder that appears whole or not at all.

    Args:
        recipe: the YAML file.
        out: the folder, which must not exist.
        options: mergekit's.
        force: go on where the doctor finds a problem.
        tell: receives the last line of mergekit's output while it grows.
        log: receives all of it at the end, if the options ask for it.

    Raises:
        CartError: as `merge.merge`; or the file is no recipe, or OUT cannot be written.
    """
    read(recipe, out)
    with unfinished(out) as folder:
        work = folder / _WORK
        work.mkdir()
        written = work / "merge.log"
        try:
            done = merge.merge(
                recipe,
                folder,
                options,
                log=written,
                scratch=work,
                name=out.resolve().name,
                force=force,
                tell=tell,
            )
        finally:
            if options.verbosity and written.is_file():
                log(written.read_text(errors="replace"))
        shutil.rmtree(work)
    return done


def read(recipe: Path, out: Path) -> Inputs:
    """The models of a file's one recipe.

    Raises:
        CartError: the file is no recipe, or OUT is no place for its result.
    """
    documents, findings = load(recipe)
    if findings:
        raise CartError(f"{recipe}: {findings[0].fact}; {findings[0].advice}")
    if len(documents) > 1:
        raise CartError(
            f"{recipe} holds several recipes; merge takes one (mergekit-multi: several)"
        )
    inputs = read_inputs(documents[0])
    models = [held.path for held in inputs.checkpoints.values()]
    _check_place(out, [*models, *map(Path, inputs.adapters.values())])
    return inputs


def _check_place(out: Path, given: list[Path]) -> None:
    """Refuse to write into an input, model or adapter, or around it.

    Raises:
        CartError: the output folder is an input, inside one, or holds one.
    """
    place = out.resolve()
    for folder in given:
        own = folder.resolve()
        if own == place or own in place.parents or place in own.parents:
            raise CartError(
                f"{out} would overwrite or mix with the input {folder}; name another folder"
            )
