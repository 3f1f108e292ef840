"""Tables as Markdown."""

from __future__ import annotations

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
