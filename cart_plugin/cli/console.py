"""What commands print on: the terminal, findings on it, and progress."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from cart_plugin.doctor.findings import Level, Section

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_MARK_WIDTH = max(len(level.value) for level in Level) + 2


def console() -> Console:
    """Standard output at the terminal's width; not wrapped in files and pipes (logs, grep)."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=10_000)


def print_section(out: Console, section: Section) -> None:
    """Print a heading and its findings, wrapped under themselves."""
    out.print(Text(section.title, style="bold"))
    for finding in section.findings:
        mark = Text(f"  {finding.level.value:<{_MARK_WIDTH}}", style=_STYLES[finding.level])
        _print_wrapped(out, mark, finding.fact)
        if finding.advice:
            arrow = Text(" " * (_MARK_WIDTH + 2) + "-> ", style="dim")
            _print_wrapped(out, arrow, finding.advice)


def _print_wrapped(out: Console, head: Text, body: str) -> None:
    # Wrapped here, not by rich, so that paths and names are never cut and nothing is padded.
    lines = textwrap.wrap(
        body,
        width=max(out.width - len(head), 30),
        break_long_words=False,
        break_on_hyphens=False,
    )
    for number, line in enumerate(lines):
        out.print(head if number == 0 else " " * len(head), Text(line), sep="", soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal, for functions that tell a step, how much is done, and of how much."""
    from rich.progress import Progress, TaskID

    bars: dict[str, TaskID] = {}
    terminal = console()
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:

        def tell(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = bar.add_task(step, total=total)
            bar.update(bars[step], completed=done)

        yield tell


def print_report(terminal: Console, report: Any) -> None:
    """Print the tables of a command's report, and its notes below."""
    for table in report.tables():
        terminal.print(table)
        terminal.print()
    for note in report.notes:
        terminal.print(f"note: {note}", soft_wrap=True, markup=False)
