"""What a check found: a level, a short fact, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad a finding is; the value is the word printed."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of a report; everything that is not ok carries advice.

    Attributes:
        level: how bad it is.
        fact: what was found.
        advice: what to do about it.
        of_architecture: it is mergekit's support of an architecture that is at fault, and not the
            recipe: the tensors can be merged one by one.
    """

    level: Level
    fact: str
    advice: str = ""
    of_architecture: bool = False


@dataclass(frozen=True)
class Section:
    """Findings under a heading."""

    title: str
    findings: Sequence[Finding]


def ok(fact: str) -> Finding:
    """A fact that needs no action."""
    return Finding(Level.OK, fact)


def warning(fact: str, advice: str) -> Finding:
    """Something that works but may not do what is wanted, and what to do about it."""
    return Finding(Level.WARNING, fact, advice)


def problem(fact: str, advice: str, *, of_architecture: bool = False) -> Finding:
    """Something that stops the merge or spoils its result, and what to do about it."""
    return Finding(Level.PROBLEM, fact, advice, of_architecture)
