"""What the benchmarks' commands have in common: options, a progress bar, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.common.measure import RESULTS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def out_option(folder: str) -> Decorator:
    """Where results go: a folder of `benchmarks/results` by default."""
    kind = click.Path(path_type=Path)
    return click.option("--out", type=kind, default=RESULTS / folder, help="Results' folder.")


def runs_option(default: int) -> Decorator:
    """How often each case runs."""
    return click.option("--runs", default=default, show_default=True, help="Of each case.")


quick_option = click.option(
    "--quick", is_flag=True, help="Tiny models: shows that it works, and no speed."
)
resume_option = click.option(
    "--resume/--anew", default=True, help="Keep what is measured already, or do not."
)
workers_option = click.option(
    "--workers", default=2, show_default=True, help="Processes of one thread each."
)
report_option = click.option(
    "--report", "only_report", is_flag=True, help="Tables and plots from the results."
)


def named(option: str, text: str, names: Collection[str]) -> list[str]:
    """The names that an option lists, with commas between.

    Raises:
        click.BadParameter: one is not known.
    """
    found = [name for name in text.split(",") if name]
    if unknown := sorted(set(found) - set(names)):
        known = ", ".join(names)
        raise click.BadParameter(f"{option}: {', '.join(unknown)}; there are {known}")
    return found


def progress(console: Console | None = None) -> Progress:
    """A bar with what is done, of how much, and the time that it took."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def publish(text: str, path: Path, console: Console) -> None:
    """Write a table's file and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
