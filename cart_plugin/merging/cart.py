"""CART on one weight: centre, truncate, recombine.

For fine-tuned weights ``W_1 .. W_T`` of one tensor (arXiv 2412.12153, section 4)::

    centre = sum_t w_t W_t / sum_t w_t
    merged = centre + lambda * sum_t (w_t / mean(w)) * SVD_k(W_t - centre)

With ``lambda: auto`` the second term is the one of least interference between the tasks instead
(`cart_plugin.merging.least_interference`), which has no scale to choose; where the base model is
known, that tells where their inputs lie (`cart_plugin.merging.informed`).
Tensors that are not decomposed end at the centre: the centred task vectors sum to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cart_plugin.errors import CartError, CartWarning
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.rounding import centred_rounding, difference_rounding
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.linalg.threads import SIDE_BY_SIDE, side_by_side, worth
from cart_plugin.merging.informed import Change, few_directions, informed_sum, sum_of_low_rank
from cart_plugin.merging.inputs import (
    check_finite,
    check_inputs,
    check_kind,
    common_dtype,
    normalised,
)
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.least_interference import least_interference
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed, matrix_shape, tensor_seed


def merge_tensors(
    tensors: Sequence[Tensor],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    name: str | None = None,
    models: Sequence[str] | None = None,
    decompose: bool | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Merge the versions of one tensor that several fine-tuned models hold.

    Peak memory beyond the inputs is a few copies of one tensor in fp32, for any number of models:
    about five where an eighth of the directions or less is kept, up to thirteen where nearly all
    are, or with ``energy``. On CPUs it may be as many times as large as torch has threads for
    tensors of which `cart_plugin.linalg.threads.SIDE_BY_SIDE` holds several. With
    ``lambda_="auto"`` it depends on the models' number, too, up to a limit
    (`cart_plugin.merging.least_interference.least_interference`).

    Args:
        tensors: one a model, all of one shape, on one device. At least two.
        settings: parameters of the method; the defaults if None.
        weights: one a model: weights of the mean, and, scaled to mean 1, of each model's low-rank
            term. None means equal.
        base: the base model's tensor: needed by ``center="base"``, and of use with
            ``lambda_="auto"``.
        name: the tensor's name: decides what it is (see `is_decomposed`) and appears in errors.
        models: the models' names, for errors; their numbers if None.
        decompose: overrides `is_decomposed`.
        kept: counts what is kept of the differences, where all of it would be the plain average:
            around the average of three models or more, and unless ``lambda_`` is ``"auto"``.

    Returns:
        The merged tensor, in the dtype to which the inputs promote.

    Raises:
        CartError: fewer than two tensors, shapes that differ, values that are not finite or not
            floating point, weights that sum to nothing, a missing base, or a result that the
            inputs' dtype cannot hold.
    """
    settings = settings or CartSettings()
    models, where = check_inputs(tensors, base, settings.center, name, models)
    dtype = common_dtype(tensors)
    if tensors[0].numel() == 0:
        return tensors[0].to(dtype, copy=True)
    if decompose is None:
        decompose = is_decomposed(name, tensors[0].shape)
    if settings.rule.keeps_nothing:
        decompose = False

    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        shares = normalised(weights, len(tensors), where)
        one = Inputs(tensors, shares, models, name, where)
        if decompose and base is not None and settings.is_informed(one.counting):
            merged = _informed(one, base, settings)
        else:
            centre = base if decompose and settings.center == "base" else None
            merged = centre_of(tensors, shares, centre, models, where)
            if decompose:
                of_adapters = of_low_rank(one, merged, base, settings)
                merged = (
                    _add_low_rank(one, merged, settings, kept, has_base=base is not None)
                    if of_adapters is None
                    else of_adapters
                )
        result = merged.to(dtype)
        # The sum alone is cheaper, but may overflow where no value does.
        if not bool(torch.isfinite(result.sum(dtype=merged.dtype)) or torch.isfinite(result).all()):
            raise CartError(
                f"{where}: the merged values leave the range of {dtype}; use a wider dtype "
                "(float32 or bfloat16)"
                + ("" if settings.lambda_ == "auto" else ", or a smaller lambda")
            )
        return result


_T = TypeVar("_T")


class Inputs(NamedTuple):
    """One tensor of all models, which have passed the checks."""

    tensors: Sequence[Tensor]
    shares: Sequence[float]  # weights that sum to 1
    models: Sequence[str]
    name: str | None
    where: str

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

    def rounding(self, shape: tuple[int, int, int], base: Tensor | None = None) -> list[Tensor]:
        """Squared norms of the rounding errors in each tensor that has a weight, ``(stack,)``.

        With a base in its difference from that: see `difference_rounding`.
        """
        pairs = zip(self.tensors, self.shares, strict=True)
        counting = [tensor.reshape(shape) for tensor, share in pairs if share]
        return difference_rounding(counting, None if base is None else base.reshape(shape))

    def centred_rounding(self, shape: tuple[int, int, int]) -> list[Tensor]:
        """The same of the differences from the weighted mean."""
        return centred_rounding(self.rounding(shape), [share for share in self.shares if share])

    def check_weights(self) -> None:
        """Refuse negative weights, which have no meaning in a least-squares sum."""
        if min(self.shares) < 0:
            raise CartError(
                f"{self.where}: cart_auto (lambda: auto) takes no negative weights; merge with cart"
            )


def _add_low_rank(
    inputs: Inputs, centre: Tensor, settings: CartSettings, kept: Kept | None, *, has_base: bool
) -> Tensor:
    """``centre + lambda * T * sum_t share_t SVD_k(W_t - centre)``, for shares that sum to 1.

    With ``lambda: auto`` the truncated differences, so weighted, make the term of least
    interference.
    """
    shape = matrix_shape(inputs.name, centre.shape)
    are_two = inputs.counting == 2
    if settings.center == "base" or settings.lambda_ == "auto" or are_two:
        kept = None
    if settings.center != "base":
        _, m, n = shape
        if settings.lambda_ != "auto" and settings.rule.fixed_rank(m, n) == min(m, n):
            # At full rank nothing is truncated, and the weighted sum is zero.
            if kept is not None:
                _count_whole(inputs, centre, kept)
            return centre
        if are_two:
            warnings.warn(_two_models(settings, has_base=has_base), CartWarning, stacklevel=3)

    of_rank = settings.rule.of_numerical_rank or kept is not None
    rounding = inputs.centred_rounding(shape) if of_rank else [None] * inputs.counting
    check = settings.center == "base"

    def low_rank(delta: Tensor, place: int) -> LowRank:
        return truncated(delta, settings, inputs.name, rounding[place])

    if settings.lambda_ == "auto":
        inputs.check_weights()
        found = least_interference(inputs.each(centre, low_rank, check=check))
        return centre.clone(memory_format=torch.contiguous_format).add_(
            found.to(centre.device).view(centre.shape)
        )

    def counted(delta: Tensor, place: int) -> tuple[LowRank, Tensor | None]:
        energy = None if kept is None else total_energy(delta.reshape(shape))
        return low_rank(delta, place), energy

    merged = centre.clone(memory_format=torch.contiguous_format)
    sums = merged.view(shape)
    parts = inputs.each(centre, counted, check=check)
    for ((factors, energy), weight), noise in zip(parts, rounding, strict=True):
        factors.add_to_(sums, settings.lambda_ * weight)
        if kept is not None and energy is not None:
            kept.add(inputs.name or "", energy, factors, noise)
    return merged


def _count_whole(inputs: Inputs, centre: Tensor, kept: Kept) -> None:
    """Count differences that are kept as they are."""
    shape = matrix_shape(inputs.name, centre.shape)

    def energy_of(delta: Tensor, _: int) -> Tensor:
        return total_energy(delta.reshape(shape))

    for energy, _ in inputs.each(centre, energy_of, check=False):
        kept.add(inputs.name or "", energy, None, None)


def _two_models(settings: CartSettings, *, has_base: bool) -> str:
    """What to say where two models are merged around their average."""
    if settings.lambda_ == "auto" and settings.center is None:
        advice = "give their base model, which shows where the inputs of each lie"
    elif settings.lambda_ == "auto":
        advice = "leave center out, with the base model given"
    else:
        advice = "use cart_auto" + ("" if has_base else " with their base model")
    return (
        "with two models CART is plain averaging: their centred task vectors are opposite and "
        f"cancel at any rank; {advice}, or use three models or more (of weight above 0)"
    )


def _informed(inputs: Inputs, base: Tensor, settings: CartSettings) -> Tensor:
    """``average + M`` for the M of `informed_sum`."""
    inputs.check_weights()
    average = centre_of(inputs.tensors, inputs.shares, None, inputs.models, inputs.where)
    start = centre_of(inputs.tensors, inputs.shares, base, inputs.models, inputs.where)
    shape = matrix_shape(inputs.name, average.shape)

    def centred(delta: Tensor, _: int) -> LowRank:
        return truncated(delta, settings, inputs.name)

    added = informed_sum(
        _changes(inputs, start, base, settings),
        (average - start).reshape(shape),
        lambda: least_interference(inputs.each(average, centred, check=False)),
    )
    return average.contiguous().add_(added.to(average.device).view(average.shape))


def of_low_rank(
    inputs: Inputs, average: Tensor, base: Tensor | None, settings: CartSettings
) -> Tensor | None:
    """The average and what `sum_of_low_rank` adds, if that is how so many models are merged."""
    if not settings.looks_for_low_rank(inputs.counting):
        return None
    inputs.check_weights()
    changes = changes_of_many(inputs, base, settings)
    added = sum_of_low_rank(changes, matrix_shape(inputs.name, average.shape)[-1])
    if added is None:
        return None
    return average.contiguous().add_(added.to(average.device).view(average.shape))


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
    return _changes(inputs, start, reference, settings)


def _changes(
    inputs: Inputs, start: Tensor, base: Tensor, settings: CartSettings
) -> Iterator[Change]:
    """What the models differ by from a base, which is `start` in fp32, one after the other."""
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

    parts = zip(inputs.each(start, reduced, check=False), inputs.rounding(shape, base), strict=True)
    for ((factors, leading, energy), weight), rounding in parts:
        yield Change.of(factors, weight, energy, rounding, leading)


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
    """The low-rank part of a task vector, as factors of its matrices (`matrix_shape`)."""
    matrices = delta.reshape(matrix_shape(name, delta.shape))
    svd, seed = settings.solver, settings.seed
    return factors_of(matrices, settings.rule, name, svd=svd, seed=seed, rounding=rounding)


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
