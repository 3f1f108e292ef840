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
from collections.abc import Sequence

import torch
from torch import Tensor

from cart_plugin.errors import CartWarning
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import total_energy
from cart_plugin.merging.differences import (
    Inputs,
    centre_of,
    centred_parts,
    changes_from,
    changes_of_many,
    truncated,
)
from cart_plugin.merging.informed import informed_sum, sum_of_low_rank
from cart_plugin.merging.inputs import (
    check_centre,
    check_inputs,
    check_range,
    common_dtype,
    normalised,
)
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.least_interference import least_interference
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed, matrix_shape


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
    turned: bool = False,
    base_is_rounded: bool = False,
) -> Tensor:
    """Merge the versions of one tensor that several fine-tuned models hold.

    Peak memory beyond the inputs is a few copies of one tensor in fp32, for any number of models:
    about five where an eighth of the directions or less is kept, up to thirteen where nearly all
    are, or with ``energy``. On CPUs it may be as many times as large as torch has threads for
    tensors of which `cart_plugin.linalg.threads.SIDE_BY_SIDE` holds several. With
    ``lambda_="auto"`` it depends on the models' number, too, up to a limit
    (`cart_plugin.merging.least_interference.least_interference`, and for what LoRA has changed
    `cart_plugin.merging.low_rank_changes.combine_factors`).

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
        turned: the tensor is stored as (inputs, outputs), as GPT-2's are: of use with
            ``lambda_="auto"``, which goes by a task's inputs.
        base_is_rounded: the base's values were rounded after training started from them, as the
            models' were: by a cast to the dtype of the merge, for one.

    Returns:
        The merged tensor, in the dtype to which the inputs promote.

    Raises:
        CartError: fewer than two tensors, shapes that differ, values that are not finite or not
            floating point, weights that sum to nothing, a missing base, or a result that the
            inputs' dtype cannot hold.
    """
    settings = settings or CartSettings()
    models, where = check_inputs(tensors, models, name)
    dtype = common_dtype(tensors)
    if tensors[0].numel() == 0:
        return tensors[0].to(dtype, copy=True)
    if decompose is None:
        decompose = is_decomposed(name, tensors[0].shape)
    if settings.rule.keeps_nothing:
        decompose = False
    if decompose:
        check_centre(base, settings.center, where)
    is_turned = decompose and turned and settings.lambda_ == "auto"
    if is_turned:
        tensors = [tensor.mT for tensor in tensors]
        base = None if base is None else base.mT

    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        shares = normalised(weights, len(tensors), where)
        one = Inputs(tensors, shares, models, name, where, base_is_rounded)
        if decompose and base is not None and kept is not None:
            _tell_use_of_base(one.counting, settings, kept)
        if decompose and base is not None and settings.is_informed(one.counting):
            merged = _informed(one, base, settings)
        else:
            centre = base if decompose and settings.center == "base" else None
            merged = centre_of(tensors, shares, centre, models, where)
            if decompose:
                of_adapters = of_low_rank(one, merged, base, settings)
                merged = (
                    _add_low_rank(one, merged, settings, kept)
                    if of_adapters is None
                    else of_adapters
                )
        remedy = "" if settings.lambda_ == "auto" else ", or a smaller lambda"
        result = merged.to(dtype)
        check_range(result, where, remedy)
        return result.mT.contiguous() if is_turned else result


def _add_low_rank(
    inputs: Inputs, centre: Tensor, settings: CartSettings, kept: Kept | None
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
            warnings.warn(_two_models(settings), CartWarning, stacklevel=3)

    rounding = inputs.rounding_in(settings, shape)
    if kept is not None and not settings.rule.of_numerical_rank:
        rounding = inputs.centred_rounding(shape)
    check = settings.center == "base"

    def low_rank(delta: Tensor, place: int) -> LowRank:
        return truncated(delta, settings, inputs.name, rounding[place])

    if settings.lambda_ == "auto":
        inputs.check_weights()
        parts = inputs.each(centre, low_rank, check=check)
        found = least_interference(parts, rounding=rounding)
        return centre.clone(memory_format=torch.contiguous_format).add_(
            found.to(centre.device).view(centre.shape)
        )

    def counted(delta: Tensor, place: int) -> tuple[LowRank, Tensor | None]:
        energy = None if kept is None else total_energy(delta.reshape(shape))
        return low_rank(delta, place), energy

    merged = centre.clone(memory_format=torch.contiguous_format)
    sums = merged.view(shape)
    kept_parts = inputs.each(centre, counted, check=check)
    for ((factors, energy), weight), noise in zip(kept_parts, rounding, strict=True):
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


def _tell_use_of_base(models: int, settings: CartSettings, kept: Kept) -> None:
    """Log what becomes of the base model where there is no lambda."""
    if settings.is_informed(models):
        kept.tell(f"the base model shows where the inputs of the {models} models' tasks lie")
    elif settings.looks_for_low_rank(models) and settings.center is None:
        kept.tell(
            f"the base model only tells whether adapters have made the {models} models: five and "
            "more merge better around their average"
        )


def _two_models(settings: CartSettings) -> str:
    """What to say where two models are merged around their average."""
    if settings.lambda_ == "auto" and settings.center is None:
        advice = "give their base model, which shows where the inputs of each lie"
    elif settings.lambda_ == "auto":
        advice = "leave center out, with the base model given"
    else:
        advice = "use cart_auto (lambda: auto) with their base model"
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

    def least() -> Tensor:
        rounding = inputs.rounding_in(settings, shape)
        parts = centred_parts(inputs, average, settings, rounding)
        return least_interference(parts, rounding=rounding)

    added = informed_sum(
        changes_from(inputs, start, base if inputs.base_is_rounded else None, settings),
        (average - start).reshape(shape),
        least,
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
