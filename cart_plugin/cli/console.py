"""What commands print on: the terminal, findings on it, and progress."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from cart_plugin.doctor.findings import Level, Section

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_LINE_EVERY = 60.0  # seconds
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


class _Lines:
    """When a log gets its next line: a minute after the last one."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def are_due(self) -> bool:
        """Whether it is time; if so, the next minute begins."""
        now = time.monotonic()
        is_due = now - self._last >= _LINE_EVERY
        self._last = now if is_due else self._last
        return is_due


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """How a function goes that tells a step, how much is done, and of how much.

    A bar on the terminal; elsewhere a line a minute, on standard error.
    """
    from rich.progress import Progress, TaskID

    bars: dict[str, TaskID] = {}
    terminal, lines = console(), _Lines()
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:

        def tell(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = bar.add_task(step, total=total)
            bar.update(bars[step], completed=done)
            if not terminal.is_terminal and lines.are_due():
                click.echo(f"{step}: {done:,} of {total:,}", err=True)

        yield tell


class Transfers:
    """How a merge by several workers goes: a bar on the terminal, a line a minute elsewhere."""

    def __init__(self, terminal: Console, bar: Any, *, quiet: bool = False) -> None:
        self._terminal = terminal
        self._quiet = quiet
        self._bar = bar
        self._task = bar.add_task("starting", total=None, rates="")
        self._begun: float | None = None
        self._lines = _Lines()

    def tell(self, step: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=step[: max(self._terminal.width - 70, 30)])

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._terminal.print(f"note: {text}", soft_wrap=True, markup=False)

    def show(self, state: Any, tensors: int, size: int) -> None:
        """Take in the workers' progress (`distributed.progress.State`), and what there will be."""
        from cart_plugin.doctor.machine import size as readable

        now = time.monotonic()
        begun = self._begun = self._begun or now
        seconds = max(now - begun, 1e-9)
        rates = [
            f"{word} {readable(count / seconds)}/s"
            for word, count in (("reads", state.read), ("writes", state.written))
            if seconds > 1 and count
        ]
        todo = size - state.found - state.written
        if state.written and seconds > 1:
            left = timedelta(seconds=round(todo * seconds / state.written))
            rates.append(f"{max(left, timedelta(0))} left")
        what = f"{state.tensors:,} of {tensors:,} tensors"
        self._bar.update(
            self._task,
            description=what,
            completed=state.found + state.written,
            total=size,
            rates=", ".join(rates),
        )
        silent = self._quiet or self._terminal.is_terminal
        if not silent and self._lines.are_due():
            self._terminal.print(", ".join([what, *rates]), soft_wrap=True, markup=False)


@contextmanager
def transfers(terminal: Console, *, quiet: bool = False) -> Iterator[Transfers]:
    """Show a merge by several workers while it runs; if quiet, what has to be read only."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"))
    shown = terminal.is_terminal and not quiet
    with Progress(*columns, console=terminal, transient=True, disable=not shown) as bar:
        yield Transfers(terminal, bar, quiet=quiet)


def print_report(terminal: Console, report: Any) -> None:
    """Print the tables of a command's report, and its notes below."""
    for table in report.tables():
        terminal.print(table)
        terminal.print()
    for note in report.notes:
        terminal.print(f"note: {note}", soft_wrap=True, markup=False)
