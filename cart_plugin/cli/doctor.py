"""`mergekit-cart doctor`: is the installation able to merge, and is a recipe worth starting?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from cart_plugin.cli.console import console, print_section
from cart_plugin.doctor.findings import Finding, Level, Section, problem
from cart_plugin.errors import first_line
from cart_plugin.wording import count


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder the merge will be written to; its file system must have room.  "
    "[default: the current folder]",
)
def doctor(recipe: Path | None, out: Path | None) -> None:
    """Check the installation and, if there is one, a RECIPE.

    Reads configurations and the headers of weight files, and downloads nothing. The weights' values
    it reads for one question alone: whether they fit where a recipe says `dtype: float16` or
    `out_dtype: float16`.
    Each line is marked ok, warning or problem, and says what to do. Exit code 1 if there is a
    problem; warnings do not count.
    """
    from cart_plugin.doctor.environment import check_environment

    terminal = console()
    findings: list[Finding] = []

    def show(section: Section) -> None:
        print_section(terminal, section)
        findings.extend(section.findings)

    usable = check_environment(show)
    if recipe is not None:
        if usable:
            _check_recipe(recipe, out, show)
        else:
            terminal.print("The recipe was not checked: that needs a working mergekit and torch.")

    levels = Counter(finding.level for finding in findings)
    terminal.print()
    if levels[Level.PROBLEM]:
        terminal.print(
            f"{count(levels[Level.PROBLEM], 'problem')}, {count(levels[Level.WARNING], 'warning')}",
            style="bold red",
        )
        raise click.exceptions.Exit(1)
    summary = "No problems"
    if levels[Level.WARNING]:
        summary += f", {count(levels[Level.WARNING], 'warning')}"
    terminal.print(summary, style="bold green")


def _check_recipe(recipe: Path, out: Path | None, show: Callable[[Section], None]) -> None:
    from cart_plugin.doctor.recipe import check_recipe

    try:
        check_recipe(recipe, out, show)
    except Exception as error:  # whatever is wrong with a recipe, its author gets no traceback
        show(
            Section(
                "Not checked further",
                [
                    problem(
                        f"the check itself failed: {first_line(error)}",
                        "please report this with the recipe; mergekit may still be able to merge",
                    )
                ],
            )
        )
