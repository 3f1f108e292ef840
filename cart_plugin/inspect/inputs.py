"""What a model multiplies a weight by, and what its difference answers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cart_plugin.linalg.precision import full_precision


class Inputs(NamedTuple):
    """What a model multiplies a weight by.

    Attributes:
        columns: an input each: ``(n, N)``, of a stack ``(stack, n, N)``; with m in the place of n
            where they are turned. Columns of zeros are none.
        turned: the weight is stored as (inputs, outputs).
    """

    columns: Tensor
    turned: bool = False

    @property
    def reach(self) -> float:
        """The share of a stack's matrices that got any."""
        if self.columns.ndim == 2:
            return 1.0
        return float(self.columns.ne(0).any(dim=-1).any(dim=-1).double().mean())


class Heard(NamedTuple):
    """What a model's difference answers to inputs.

    Attributes:
        inputs: in the coordinates of merged differences, ``(stack, q, N)``.
        own: the answer, ``(stack, p, N)``.
        turned: see `Inputs`.
    """

    inputs: Tensor
    own: Tensor
    turned: bool = False

    def answer(self, total: Tensor) -> Tensor:
        """What a merged difference answers, ``(stack, p, N)``."""
        with full_precision(total.device):
            return (total.mT if self.turned else total) @ self.inputs.to(total)
