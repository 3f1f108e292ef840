"""What fine-tuned weights differ by: from their centre, their base, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.rounding import (
    beyond_rounding,
    centred_rounding,
    difference_rounding,
    is_rounded,
)
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.linalg.threads import SIDE_BY_SIDE, side_by_side, worth
from cart_plugin.merging.informed import Change, few_directions
from cart_plugin.merging.inputs import check_finite, check_kind, common_dtype
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import matrix_shape, tensor_seed

_T = TypeVar("_T")


class Inputs(NamedTuple):
    """One tensor of all models, which have passed the checks."""

    tensors: Sequence[Tensor]
    shares: Sequence[float]  # weights that sum to 1
    models: Sequence[str]
    name: str | None
    where: str
    base_is_rounded: bool = False  # see `cart_plugin.merging.cart.merge_tensors`

    @property
    def counting(self) -> int:
        """The number of models that have a weight."""
        return sum(share != 0 for share in self.shares)

    def each(
        self, centre: Tensor, reduced: Callable[[Tensor, int], _T], *, check: bool
    ) -> Iterator[tuple[_T, float]]:
        """What a function makes of each difference, and the weight, of models that have one.

        A difference exists only while it is reduced; small ones are side by side.

        Args:
            centre: of the tensors' shape.
            reduced: takes a difference from the centre, and its place among those.
            check: for values that are not finite, which a mean of all would have shown.
        """
        models = zip(self.tensors, self.shares, self.models, strict=True)
        counting = [(tensor, share, model) for tensor, share, model in models if share]

        def found(place: int) -> _T:
            tensor, _, model = counting[place]
            delta = tensor - centre
            if check:
                check_finite(delta, [model], [tensor], self.where)
            return reduced(delta, place)

        stack, m, n = matrix_shape(self.name, centre.shape)
        most = SIDE_BY_SIDE // centre.numel() if centre.device.type == "cpu" else 1
        made_of_each = side_by_side(found, range(len(counting)), most, stack * worth(m, n))
        for made, (_, share, _) in zip(made_of_each, counting, strict=True):
            yield made, len(self.tensors) * share

    def rounding(self, shape: tuple[int, int, int], other: Tensor | None = None) -> list[Tensor]:
        """Squared norms of the rounding errors in each tensor that has a weight, ``(stack,)``.

        With another model's in its difference from that: see `difference_rounding`.
        """
        beside = other.reshape(shape) if other is not None and self._are_rounded(shape) else None
        return difference_rounding(self._counting(shape), beside)

    def centred_rounding(self, shape: tuple[int, int, int]) -> list[Tensor]:
        """The same of the differences from the weighted mean."""
        counting, own = self._counting(shape), self.rounding(shape)
        for place, tensor in enumerate(counting):
            others = counting[:place] + counting[place + 1 :]
            # Models that are equal here were not trained here: nothing was rounded.
            if is_rounded(tensor) and any(torch.equal(tensor, other) for other in others):
                own[place] = torch.zeros_like(own[place])
        return centred_rounding(own, [share for share in self.shares if share])

    def _counting(self, shape: tuple[int, int, int]) -> list[Tensor]:
        pairs = zip(self.tensors, self.shares, strict=True)
        return [tensor.reshape(shape) for tensor, share in pairs if share]

    def _are_rounded(self, shape: tuple[int, int, int]) -> bool:
        """Whether rounding shows in what training changed.

        Not so if any model has more bits: then one with fewer is what training left as it was.
        """
        return all(map(is_rounded, self._counting(shape)))

    def rounding_in(
        self, settings: CartSettings, shape: tuple[int, int, int]
    ) -> Sequence[Tensor | None]:
        """The same of the differences from the centre, where what is kept of them depends on it."""
        if settings.lambda_ == "auto":
            matters = self._are_rounded(shape)
        else:
            matters = settings.rule.of_numerical_rank
        if not matters:
            return [None] * self.counting
        return self.rounding(shape) if settings.center == "base" else self.centred_rounding(shape)

    def check_weights(self) -> None:
        """Refuse negative weights, which have no meaning in a least-squares sum."""
        if min(self.shares) < 0:
            raise CartError(
                f"{self.where}: cart_auto (lambda: auto) takes no negative weights, such as that "
                f"of {self.models[self.shares.index(min(self.shares))]}; merge with cart"
            )


def centre_of(
    tensors: Sequence[Tensor],
    shares: Sequence[float],
    base: Tensor | None,
    models: Sequence[str],
    where: str,
) -> Tensor:
    """The base model's tensor if there is one, else the weighted mean; checked to be finite.

    In fp32 or better: fp16 values may overflow in a sum in fp16.
    """
    work = torch.promote_types(common_dtype(tensors), torch.float32)
    if base is not None:
        check_kind([("the base model", base)], tensors[0].shape, models[0], where)
        check_finite(base, ["the base model"], [base], where)
        return base.to(work, copy=True)
    mean = torch.zeros(tensors[0].shape, dtype=work, device=tensors[0].device)
    for tensor, share in zip(tensors, shares, strict=True):
        mean.add_(tensor, alpha=share)
    check_finite(mean, models, tensors, where)
    return mean


def truncated(
    delta: Tensor, settings: CartSettings, name: str | None, rounding: Tensor | None = None
) -> LowRank:
    """The low-rank part of a task vector, as factors of its matrices (`matrix_shape`).

    With ``lambda: auto`` without directions that are rounding: what is left of the sum where all
    that is real cancels is scaled up.
    """
    matrices = delta.reshape(matrix_shape(name, delta.shape))
    svd, seed = settings.solver, settings.seed
    found = factors_of(matrices, settings.rule, name, svd=svd, seed=seed, rounding=rounding)
    if settings.lambda_ != "auto" or rounding is None:
        return found
    total = total_energy(matrices)
    return beyond_rounding(found, total, rounding.to(total.device))


def centred_parts(
    inputs: Inputs, average: Tensor, settings: CartSettings, rounding: Sequence[Tensor | None]
) -> Iterator[tuple[LowRank, float]]:
    """Truncated differences from the average, with the models' weights; ``rounding`` of each."""

    def centred(delta: Tensor, place: int) -> LowRank:
        return truncated(delta, settings, inputs.name, rounding[place])

    return inputs.each(average, centred, check=False)


def factors_of(
    matrices: Tensor,
    rule: RankRule,
    name: str | None,
    *,
    svd: str,
    seed: int,
    rounding: Tensor | None = None,
) -> LowRank:
    """What is kept of one model's difference from the centre.

    Args:
        matrices: the difference as ``(stack, m, n)``.
        rule: how much to keep.
        name: the tensor's, which the solver's start depends on.
        svd: solver, one of `cart_plugin.linalg.svd.SOLVERS`.
        seed: of the solver, for all tensors.
        rounding: see `truncated_svd`.

    Raises:
        CartError: as `truncated_svd`.
    """
    start = tensor_seed(seed, name or "")
    return truncated_svd(matrices, rule, svd=svd, seed=start, rounding=rounding)


def changes_of_many(
    inputs: Inputs, base: Tensor | None, settings: CartSettings
) -> Iterator[Change]:
    """What so many models differ by from the base if it is given, or else from one of them.

    Those of no weight are left out.
    """
    reference = base if settings.center is None else None
    if reference is None:
        models = zip(inputs.tensors, inputs.shares, strict=True)
        reference = next(tensor for tensor, share in models if share)
    start = centre_of(inputs.tensors, inputs.shares, reference, inputs.models, inputs.where)
    if reference is not base:  # what sets the others apart from one model is whole or nothing
        few = few_directions(*matrix_shape(inputs.name, start.shape)[1:])
        settings = replace(settings, rank_ratio=None, rank=few, energy=None)
    is_exact = reference is base and not inputs.base_is_rounded
    return changes_from(inputs, start, None if is_exact else reference, settings)


def changes_from(
    inputs: Inputs, start: Tensor, other: Tensor | None, settings: CartSettings
) -> Iterator[Change]:
    """What the models differ by from `start`, which is the base or another model.

    Args:
        inputs: the models.
        start: in fp32 or better.
        other: the same as it is stored, if it holds rounding as the models do.
        settings: of the merge.
    """
    shape = matrix_shape(inputs.name, start.shape)
    own = settings.informed
    few = few_directions(*shape[1:])
    at_few = replace(own, rank_ratio=None, rank=few, energy=None)

    def reduced(delta: Tensor, _: int) -> tuple[LowRank, Tensor, Tensor]:
        delta = delta.cpu() if delta.device.type == "mps" else delta  # it has no fp64
        factors = truncated(delta, own, inputs.name)
        # What made a change does not depend on how much a recipe keeps of it.
        enough = (own.rule.fixed_rank(*shape[1:]) or 0) >= few
        leading = factors if enough else truncated(delta, at_few, inputs.name)
        return factors, leading.S, total_energy(delta.reshape(shape))

    noise = inputs.rounding(shape, other)
    parts = zip(inputs.each(start, reduced, check=False), noise, strict=True)
    for ((factors, leading, energy), weight), rounding in parts:
        yield Change.of(factors, weight, energy, rounding, leading)
