"""Counts and lists of names in messages."""

from __future__ import annotations

from collections.abc import Iterable


def count(number: int, noun: str) -> str:
    """The number with its noun, in the plural where it needs one: `1 tensor`, `1,204 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Iterable[object], limit: int = 3) -> str:
    """The first few names of a list, and how many more there are."""
    shown = [str(name) for name in names]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest:,} more" if rest > 0 else "")
