"""Checks of the folder of the result: that nothing is lost there, and that it can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe, references


def check_out(out: Path, config: Recipe) -> list[Finding]:
    """Check a result's folder against the recipe's inputs and the file system.

    Paths are compared as the disk has them: through links, relative steps and trailing slashes.
    """
    place = _real(out)
    findings = list(_check_inputs(out, place, config))
    return findings or list(_check_place(out, place))


def _check_inputs(out: Path, place: Path, config: Recipe) -> Iterator[Finding]:
    elsewhere = "write the result to a folder of its own, outside of every input"
    for kind, name in dict.fromkeys(_inputs(config)):
        if not os.path.exists(name):
            continue  # reported with the inputs, or an id on the hub
        given = _real(Path(name))
        if place == given:
            yield problem(f"OUT {out} is {kind} {name}: it would be overwritten", elsewhere)
        elif given in place.parents:
            yield problem(f"OUT {out} lies inside {kind} {name}", elsewhere)
        elif place in given.parents:
            yield problem(
                f"{kind} {name} lies inside OUT {out}: whoever removes or replaces the result "
                "removes it, too",
                elsewhere,
            )


def _inputs(config: Recipe) -> Iterator[tuple[str, str]]:
    for model in references(config).values():
        yield "model", model.model.path
        if model.lora is not None:
            yield "adapter", model.lora.path


def _check_place(out: Path, place: Path) -> Iterator[Finding]:
    standing = place
    while not os.path.lexists(standing):
        standing = standing.parent
    if not standing.is_dir():
        what = "a file" if standing.is_file() else "no folder"
        yield problem(
            f"OUT {out} is {what}"
            if standing == place
            else f"{standing} on the way to OUT is {what}",
            "name a folder, which need not be there yet",
        )
    elif not os.access(standing, os.W_OK | os.X_OK):
        yield problem(
            f"OUT {out} cannot be written: {standing} is not yours to write to",
            "name a folder of your own, or change its permissions (chmod u+w)",
        )
    elif standing == place and os.access(place, os.R_OK) and any(place.iterdir()):
        yield warning(
            f"{out} is not empty; mergekit overwrites files of the same name and keeps the others",
            "choose another folder, or empty it",
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
