"""How fine-tuned weights are combined where their base model is known, with nothing to tune.

`cart_plugin.merging.least_interference` takes the covariance of a task's inputs from its centred
task vector, which holds ``1/T`` of every other task's, too; of two models the two are opposite:
they have one covariance, and their average is all that is left. Training moves a weight only within
the span of its inputs, so that what it moved, ``tau_t = W_t - W_base``, shows them without the
others. With ``tau_t = U_t S_t V_t^T``, truncated, the system is the same ::

    M = (sum_t w_t D_t C_t + s P) (sum_t w_t C_t + r I)^-1,    P = sum_t w_t D_t / rho

for ``C_t = V_t S_t^2 V_t^T``, divided by its trace, and the part of the centred task vector that
acts on the task's own inputs ::

    D_t = (W_t - average) V_t V_t^T = (U_t S_t - (average - W_base) V_t) V_t^T

``r`` and ``s`` are 0.3 of the mean eigenvalue of ``sum_t w_t C_t`` over the directions that the
``V_t`` hold, at most n: of n inputs, adapters move a few. rho is taken to be 0.3 at least: of
adapters that share their leading inputs the sum of the ``D_t`` keeps less, and is blown up.

The merged weight is ``average + M``. Equal models give themselves: their ``D_t`` are zero. Models
whose inputs have nothing in common keep their own answers: ``rho`` is 1, and P is what each lacks.

Kin: RegMean (arXiv 2212.09849) has the first term with covariances of real activations; WUDI
(arXiv 2503.08099), SWUDI and ASWUDI (arXiv 2606.07289) filter the eigenvalues of ``sum C_t``, with
the sum of the ``tau_t`` in the place of P. What was tried besides, and what it brought:
``benchmarks/notes/auto.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rounding import beyond_rounding
from cart_plugin.merging import low_rank_changes
from cart_plugin.merging.normal_equations import System

INFORMED_RANK_RATIO = 0.24
INFORMED_RIDGE = 0.3
INFORMED_LEAST_KEPT = 0.3
"""The least rho."""
MOST_INFORMED = low_rank_changes.FEW_TASKS
"""Models beyond which the base is left out: with six and more of them the centred task vectors hold
little of each other, and were ahead on images (``benchmarks/notes/auto.md``). Of so many the mean
of both results is taken, which is better than either. Changes of low rank have forms of their own:
see `cart_plugin.merging.low_rank_changes`."""

# Singular values below this share of the largest are rounding, or directions of no weight.
LEAST_SHARE = 1e-2
_MOST_OF_LORA = 256

LOW_RANK: dict[str, Any] = {
    "ridge": INFORMED_RIDGE,
    "least_kept": INFORMED_LEAST_KEPT,
    "least_share": LEAST_SHARE,
}
"""Of `cart_plugin.merging.low_rank_changes.combine`."""


class Change(NamedTuple):
    """What a model has changed of a weight.

    Attributes:
        factors: of ``W_t - W_base``, truncated, ``(stack, m, n)``.
        leading: its leading singular values, `few_directions` of them, ``(stack, k)``.
        weight: of the model; positive.
        energy: squared Frobenius norms of all of it, ``(stack,)``, in fp64.
        rounding: what of that rounding adds (`cart_plugin.linalg.rounding.rounding_energy`).
    """

    factors: LowRank
    leading: Tensor
    weight: float
    energy: Tensor
    rounding: Tensor

    @classmethod
    def of(
        cls,
        factors: LowRank,
        weight: float,
        energy: Tensor,
        rounding: Tensor,
        leading: Tensor | None = None,
    ) -> Change:
        """One of the factors, which hold the leading singular values unless these are given.

        Args:
            factors: as above.
            weight: as above.
            energy: as above.
            rounding: as above, on any device.
            leading: `few_directions` singular values or more.
        """
        values = factors.S if leading is None else leading
        few = few_directions(factors.U.shape[-2], factors.Vh.shape[-1])
        return cls(factors, values[..., :few], weight, energy, rounding.to(energy.device))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.factors.U.shape[-2], self.factors.Vh.shape[-1]

    @property
    def is_low_rank(self) -> bool | None:
        """Whether LoRA may have made it: see `low_rank_changes.is_low_rank`."""
        args = self.leading, self.energy, self.rounding, self.shape
        return low_rank_changes.is_low_rank(*args)

    def real(self) -> LowRank:
        """The factors without directions that are rounding; with those of any of a stack."""
        return beyond_rounding(self.factors, self.energy, self.rounding, LEAST_SHARE)


def few_directions(m: int, n: int) -> int:
    """How many are few for a weight ``(m, n)``: those that are kept of other changes, up to 256.

    LoRA of a higher rank is rare, while what whole fine-tuning moves of a large weight may well lie
    in a quarter of its directions.
    """
    return max(1, min(int(INFORMED_RANK_RATIO * min(m, n)), _MOST_OF_LORA))


class Found(NamedTuple):
    """What to add to the average of the models' weights.

    Attributes:
        added: M, of the factors' dtype, ``(stack, m, n)``. Zero if no model was changed.
        of_low_rank: whether the changes are.
        changed: the number of models that changed the weight.
    """

    added: Tensor
    of_low_rank: bool
    changed: int

    @property
    def is_halved(self) -> bool:
        """Whether the mean with the form without the base is taken."""
        return self.changed == MOST_INFORMED and not self.of_low_rank


def informed_by_base(changes: Iterable[Change], mean: Tensor) -> Found:
    """What to add to the average of the models' weights; see the module.

    Changes that are all of low rank are combined as `cart_plugin.merging.low_rank_changes` says.

    Peak memory, the changes included, is below ``2 k (m + n) + 2 k^2 + 3 m n`` numbers, for k the
    smaller of n and the sum of the ranks.

    Args:
        changes: one a model, one after the other.
        mean: ``average - W_base``, ``(stack, m, n)``.
    """
    changed = 0

    def counted() -> Iterator[Change]:
        nonlocal changed
        for change in changes:
            changed += bool((change.energy > 0).any())
            yield change

    rest = counted()
    held: list[Change] = []
    for change in rest:
        held.append(change)
        if change.is_low_rank is False:
            break
    if are_of_low_rank(held):
        parts = [(one.real(), one.weight) for one in held]
        added = low_rank_changes.combine_factors(parts, mean.shape[-1], **LOW_RANK)
        return Found(added, of_low_rank=True, changed=changed)
    system = informed_system(((one.real(), one.weight) for one in chain(held, rest)), mean)
    return Found(system.solve(), of_low_rank=False, changed=changed)


def parts_of_low_rank(changes: Iterable[Change]) -> list[tuple[LowRank, float]] | None:
    """The factors and weights of more than `MOST_INFORMED` models' changes that LoRA may have made.

    Args:
        changes: one a model, one after the other, from the base or one of the models; no more are
            taken once one is not of low rank.

    Returns:
        None if the changes are not of low rank.
    """
    parts, is_known = [], False
    for change in changes:
        told = change.is_low_rank
        if told is False:
            return None
        is_known |= told is True
        real = change.real()
        # Copies: views would keep all that was looked at, of every model.
        parts.append((LowRank(real.U.clone(), real.S, real.Vh.clone()), change.weight))
    return parts if is_known else None


def sum_of_low_rank(changes: Iterable[Change], inputs: int) -> Tensor | None:
    """What to add to the average of so many models where LoRA may have made them.

    Args:
        changes: see `parts_of_low_rank`.
        inputs: n, of the weight.

    Returns:
        M, ``(stack, m, n)``; None if the changes are not of low rank.
    """
    parts = parts_of_low_rank(changes)
    if parts is None:
        return None
    return low_rank_changes.combine_factors(parts, inputs, centred=True, **LOW_RANK)


def low_rank_by_direction(parts: Sequence[tuple[LowRank, float]], inputs: int) -> list[LowRank]:
    """The same sum over tasks and directions; see `low_rank_changes.by_direction`."""
    return low_rank_changes.by_direction(parts, inputs, centred=True, **LOW_RANK)


class FoundByDirection(NamedTuple):
    """As `Found`, as a sum over tasks and directions: ``M = sum_t w_t Q_t``.

    Attributes:
        added: ``Q_t`` for each task, as factors; the rows of ``Vh`` are not orthogonal.
        is_halved: see `Found.is_halved`.
    """

    added: list[LowRank]
    is_halved: bool


def informed_by_direction(changes: Sequence[Change], mean: Tensor) -> FoundByDirection:
    """`informed_by_base` as a sum over tasks and singular directions.

    Of whole changes ``M = sum_t w_t sum_i l_i (s_i^2 / z^2 + s / rho) v_i^T (sum_t w_t C_t + r
    I)^-1``, with ``l_i = (W_t - average) v_i`` for the directions ``v_i`` of ``tau_t``.

    Args:
        changes: one a model.
        mean: ``average - W_base``, ``(stack, m, n)``.
    """
    parts = [(one.real(), one.weight) for one in changes]
    if are_of_low_rank(changes):
        found = low_rank_changes.by_direction(parts, mean.shape[-1], **LOW_RANK)
        return FoundByDirection(found, is_halved=False)
    changed = sum(bool((one.energy > 0).any()) for one in changes)
    informed = informed_system(parts, mean)
    strength = informed.strength()
    root = torch.linalg.cholesky(informed.metric())
    found = []
    for factors, _ in parts:
        here = factors.to(root.device)
        lacking = _lacking(here, mean.to(root.device))
        with full_precision(root.device):
            right = torch.cholesky_solve(here.Vh.mT, root).mT
        norms = torch.linalg.vector_norm(lacking, dim=-2)
        size = torch.linalg.vector_norm(here.S, dim=-1, keepdim=True)
        shares = here.S / torch.where(size > 0, size, 1)
        values = torch.where(here.S > 0, norms * (shares.square() + strength[..., None]), 0)
        left = lacking / torch.where(norms > 0, norms, 1)[..., None, :]
        found.append(LowRank(left, values, right).to(mean.device))
    return FoundByDirection(found, is_halved=changed == MOST_INFORMED)


def informed_sum(changes: Iterable[Change], mean: Tensor, centred: Callable[[], Tensor]) -> Tensor:
    """What to add to the average: as `informed_by_base`, or half of it and of the form without.

    Args:
        changes: as there.
        mean: as there.
        centred: gives that other form (`cart_plugin.merging.least_interference`), if it is needed.
    """
    found = informed_by_base(changes, mean)
    added = found.added
    if found.is_halved:
        added += centred().to(added.device)
        added /= 2
    return added


def are_of_low_rank(changes: Iterable[Change]) -> bool:
    """Whether LoRA may have made all changes of which that can be told."""
    told = [change.is_low_rank for change in changes]
    return True in told and False not in told


def _lacking(factors: LowRank, mean: Tensor) -> Tensor:
    """``(W_t - average) V_t`` for the factors of ``W_t - W_base``."""
    with full_precision(mean.device):
        return factors.U * factors.S[..., None, :] - mean @ factors.Vh.mT


class Informed(NamedTuple):
    """The system, and how many directions are known."""

    system: System
    directions: Tensor

    def solve(self) -> Tensor:
        """See `informed_by_base`."""
        ridge = INFORMED_RIDGE
        return self.system.solve(
            ridge, ridge, directions=self.directions, least_kept=INFORMED_LEAST_KEPT
        )

    def strength(self) -> Tensor:
        """``s / rho``, by which the sum of what each lacks is multiplied."""
        return self.system.strength(
            INFORMED_RIDGE, directions=self.directions, least_kept=INFORMED_LEAST_KEPT
        )

    def metric(self) -> Tensor:
        """``sum w C + r I``, ``(n, n)``: by how much a change of M raises the objective."""
        return self.system.metric(INFORMED_RIDGE, directions=self.directions)


def informed_system(parts: Iterable[tuple[LowRank, float]], mean: Tensor) -> Informed:
    """The sums that `informed_by_base` solves where the changes are not of low rank.

    Args:
        parts: truncated ``W_t - W_base`` and weights, one pair after the other; of directions that
            are none the singular values are zero.
        mean: ``average - W_base``.
    """
    if mean.device.type == "mps":  # no fp64, and not all of the linear algebra
        mean = mean.cpu()
    total = System()
    directions = torch.zeros((), device=mean.device)
    for factors, weight in parts:
        factors = factors.to(mean.device)
        values = factors.S
        real = values > 0
        directions = directions + real.sum(dim=-1)
        lacking = _lacking(factors, mean)
        left = torch.where(real[..., None, :], lacking / values[..., None, :], 0)
        # In fp64: fp32 has no room for squares.
        norms = torch.linalg.vector_norm(left * values[..., None, :], dim=-2, dtype=torch.float64)
        size = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float64)
        kept = LowRank(left, values, factors.Vh)
        total.add(kept, weight, size.to(values.dtype), norms.square().sum(dim=-1))
    return Informed(total, directions)
