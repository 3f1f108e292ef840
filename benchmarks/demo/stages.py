"""What a run of the demo shows of itself: a bar a stage; plain lines where it is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

_STEP = 0.25  # plain lines tell when this share of a stage is done


class Stages:
    """The stages of a run, each shown while it lasts, and their times.

    Args:
        console: where to show them.
        count: how many there will be.

    Attributes:
        seconds: of each finished stage, by title.
    """

    def __init__(self, console: Console, count: int) -> None:
        self.console = console
        self.count = count
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, jobs: float) -> Iterator[Stage]:
        """Show a stage of so many jobs; its time counts if the block ends without an error."""
        head = f"{len(self.seconds) + 1}/{self.count} {title}"
        started = time.perf_counter()
        if self.console.is_terminal:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            with bar:
                yield _Bar(bar, head, jobs)
        else:
            self._line(head)
            yield _Lines(self._line, jobs, started)
        self.seconds[title] = time.perf_counter() - started
        done = f"{self.seconds[title]:.0f} s"
        self._line(f"{head}: {done}" if self.console.is_terminal else f"    done: {done}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Stage:
    """A stage that is shown."""

    def advance(self, jobs: float) -> None:
        """So many jobs more (or parts of one) are done."""
        raise NotImplementedError

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        raise NotImplementedError


class _Bar(Stage):
    def __init__(self, bar: Progress, head: str, jobs: float) -> None:
        self.bar = bar
        self.task = bar.add_task(head, total=jobs)

    def advance(self, jobs: float) -> None:
        self.bar.advance(self.task, jobs)

    def tell(self, text: str) -> None:
        self.bar.console.print(f"    {text}", highlight=False, markup=False)


class _Lines(Stage):
    def __init__(self, line: Callable[[str], None], jobs: float, started: float) -> None:
        self.line, self.jobs, self.started = line, jobs, started
        self.done, self.next = 0.0, _STEP

    def advance(self, jobs: float) -> None:
        self.done += jobs
        share = self.done / self.jobs + 1e-9  # parts of a job do not add up exactly
        if self.next <= share < 1:
            self.line(f"    {100 * share:.0f} % after {time.perf_counter() - self.started:.0f} s")
        while self.next <= share:
            self.next += _STEP

    def tell(self, text: str) -> None:
        self.line(f"    {text}")
