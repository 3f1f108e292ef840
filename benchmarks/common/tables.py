"""Tables as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def markdown_table(
    heading: Sequence[str], rows: Iterable[Sequence[str]], ruler: Sequence[str] | None = None
) -> str:
    """A table without a line break at its end.

    Args:
        heading: the columns' names.
        rows: cells.
        ruler: ``---`` or ``---:`` a column, for its alignment; left if None.
    """
    lines = [heading, ruler or ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent_cell(shares: Sequence[float], *, bold: bool = False) -> str:
    """A mean over seeds in per cent, with its standard error where there are several.

    Args:
        shares: one a seed, 0 to 1.
        bold: for the best of a column.
    """
    text = f"{100 * statistics.fmean(shares):.1f}"
    if len(shares) > 1:
        text += f" ± {100 * statistics.stdev(shares) / len(shares) ** 0.5:.1f}"
    return f"**{text}**" if bold else text
