"""Methods as FusionBench's commands name them, and the settings that suites choose from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

Point = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method, and what of it is tuned.

    Args:
        title: its name in tables.
        choice: its config in FusionBench: `method=<choice>`.
        options: settings that stay as they are, as Hydra overrides.
        grid: settings to choose from, by option.
        scale: the option in `grid` in which the merged weights are affine: values in between are
            computed from two merges, and only the chosen one is merged on its own.
        data: what images it needs, in words; empty for none.
        keeps: what it stores besides one model, in words; empty for nothing.
    """

    title: str
    choice: str
    options: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    scale: str | None = None
    data: str = ""
    keeps: str = ""

    def points(self) -> list[Point]:
        """All settings of the grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]

    def groups(self) -> Iterator[tuple[Point, list[Any]]]:
        """The grid by merge: settings without the scale, and the scales to try with them."""
        rest = [name for name in self.grid if name != self.scale]
        scales = list(self.grid[self.scale]) if self.scale else []
        for values in product(*(self.grid[name] for name in rest)):
            yield dict(zip(rest, values, strict=True)), scales

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        """The method's part of the command line for one setting."""
        chosen = [f"method.{name}={value}" for name, value in point.items()]
        return [f"method={self.choice}", *self.options, *chosen]


def between(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """``first + share * (last - first)``: what a method that is affine in its scale gives between.

    Args:
        first: merged weights at one scale.
        last: at another.
        share: of the way from the one to the other.
    """
    return {
        name: torch.lerp(tensor, last[name], share) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
