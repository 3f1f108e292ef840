"""What T models make of one weight, in the form that is measured: factors, norms, merges.

Two kinds come to the same: whole weights, decomposed here, and low-rank changes that are factors
from the start (adapters), in the coordinates of `cart_plugin.merging.spans`. Everything is told
relative to a centre: the base model where it is known, else the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cart_plugin.inspect.inputs import Heard, Inputs
from cart_plugin.inspect.merges import (
    ALONE,
    AUTO,
    AUTO_WITH_BASE,
    AVERAGE,
    CART,
    INFORMED,
    MERGED,
    SCALE,
    TASK_ARITHMETIC,
    Differences,
    merges_of,
    rank_of,
)
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rounding import centred_rounding, difference_rounding
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.differences import Inputs as Tensors
from cart_plugin.merging.differences import centre_of, changes_of_many
from cart_plugin.merging.informed import MOST_INFORMED, Change
from cart_plugin.merging.inputs import check_finite, check_inputs, check_kind, normalised
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.spans import Difference, Span, decomposed, merge_in_span
from cart_plugin.merging.tensors import is_decomposed, matrix_shape, tensor_seed

_CHUNK = 2**16  # numbers: their copies in fp64 stay in the cache
# From this side on differences from the average are sketched, as those from a base are, in half the
# time. Of a sketch the last directions are the poorest: a quarter more are asked for.
_SKETCHED = 512
_MARGIN = 1.25


@dataclass
class Weight:
    """One weight of T models.

    Attributes:
        name: of the tensor.
        shape: as matrices that are stored, ``(stack, m, n)``.
        shares: how much each model counts, which sums to 1.
        norms: of the models' weights, squared, ``(T,)``; None if they are not known.
        from_base: differences from the base; None without one.
        centred: those from the weighted average.
        merges: method and what it adds to the centre (the base, or the average without one), one
            after the other; in coordinates where the parts are.
        answer: takes a model's number and inputs, and gives what all of its difference answers.
    """

    name: str
    shape: tuple[int, int, int]
    shares: Sequence[float]
    norms: Tensor | None
    from_base: Differences | None
    centred: Differences
    merges: Callable[[], Iterator[tuple[str, Tensor]]]
    answer: Callable[[int, Inputs], Heard]

    @property
    def around(self) -> Differences:
        """The differences from the centre."""
        return self.from_base or self.centred


@dataclass
class Plain:
    """A tensor that no method decomposes, and of which norms are all there is to say.

    Attributes:
        name: of the tensor.
        shape: of it.
        norms: of the models' tensors, squared, ``(T,)``; None if they are not known.
        inner: inner products of the differences from the base or, without one, the average,
            ``(T, T)``.
    """

    name: str
    shape: tuple[int, ...]
    norms: Tensor | None
    inner: Tensor


def of_tensors(
    name: str,
    tensors: Sequence[Tensor],
    models: Sequence[str],
    base: Tensor | None = None,
    merged: Tensor | None = None,
    weights: Sequence[float] | None = None,
    exact: Mapping[int, Difference] | None = None,
    turned: bool = False,
) -> Weight | Plain:
    """What whole models make of a tensor.

    Args:
        name: the tensor's.
        tensors: one a model, of one shape; two at least.
        models: their names, for errors.
        base: the base model's.
        merged: that of a merged model, which is judged.
        weights: how much each model counts in merges; None for alike.
        exact: by the models' numbers, those differences from the base that are known as factors,
            such as adapters': these are not decomposed, and hold no rounding.
        turned: the tensor is stored as (inputs, outputs): all is said of its transpose.

    Raises:
        CartError: tensors that no method can merge: of different shapes, not finite, quantised; or
            weights that sum to nothing.
    """
    models, where = check_inputs(tensors, models, name)
    is_turned = turned and is_decomposed(name, tensors[0].shape)
    if is_turned:
        tensors = [tensor.mT for tensor in tensors]
        base, merged = (None if one is None else one.mT for one in (base, merged))
        exact = {i: Difference(d.right.mT, d.left.mT) for i, d in (exact or {}).items()}
    shares = normalised(weights, len(tensors), where)
    with torch.no_grad():
        mean = centre_of(tensors, shares, None, models, where)
        start = mean if base is None else centre_of(tensors, shares, base, models, where)
        if merged is not None:
            check_kind([("the merged model", merged)], tensors[0].shape, models[0], where)
            check_finite(merged, ["the merged model"], [merged], where)
        norms, inner = _products(tensors, start)
        if not is_decomposed(name, mean.shape):
            return Plain(name, tuple(mean.shape), norms, inner)
        known = exact or {}
        every = Tensors(tensors, shares, models, name, where)
        found = _decomposed(name, every, mean, base, start, merged, norms, inner, known)
        return _as_stored(found) if is_turned else found


def _decomposed(
    name: str,
    every: Tensors,
    mean: Tensor,
    base: Tensor | None,
    start: Tensor,
    merged: Tensor | None,
    norms: Tensor,
    inner: Tensor,
    exact: Mapping[int, Difference],
) -> Weight:
    tensors, shares = every.tensors, every.shares
    shape = matrix_shape(name, mean.shape)
    own = _rounding(tensors, shape, exact)
    products, about = _centred(inner, shares), centred_rounding(own, shares)
    centred = _differences(name, tensors, mean, shape, ALONE, about, products, {})
    rounding = every.rounding_in(ALONE, shape)
    from_base = None
    if base is not None:
        informed = INFORMED.informed
        from_base = _differences(name, tensors, start, shape, informed, own, inner, exact)
    offset = (mean - start).reshape(shape)

    def of_many() -> Iterator[Change]:
        return changes_of_many(every, None, INFORMED)

    def merges() -> Iterator[tuple[str, Tensor]]:
        yield from merges_of(offset, shares, centred, rounding, from_base, of_many)
        if merged is not None:
            yield MERGED, (merged - start).reshape(shape)

    def answer(index: int, inputs: Inputs) -> Heard:
        delta = (tensors[index] - start).reshape(shape)
        there = inputs.columns.to(delta).expand(shape[0], *inputs.columns.shape[-2:])
        with full_precision(delta.device):
            own = (delta.mT if inputs.turned else delta) @ there
        return Heard(there, own, inputs.turned)

    return Weight(name, shape, shares, norms, from_base, centred, merges, answer)


def _as_stored(weight: Weight) -> Weight:
    """The transpose of a weight that is stored as (inputs, outputs), told of by its own shape."""
    stack, m, n = weight.shape

    def answer(index: int, inputs: Inputs) -> Heard:
        return weight.answer(index, inputs._replace(turned=not inputs.turned))

    return replace(weight, shape=(stack, n, m), answer=answer)


def _rounding(
    tensors: Sequence[Tensor],
    shape: tuple[int, int, int],
    exact: Mapping[int, Difference],
) -> list[Tensor]:
    """Of each model, ``(stack,)``, on the CPU; nothing where a difference is exact."""
    weights = [tensor.reshape(shape) for tensor in tensors]
    found = [one.cpu() for one in difference_rounding(weights)]
    return [torch.zeros_like(one) if i in exact else one for i, one in enumerate(found)]


def _products(tensors: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``(T,)``, and inner products of the differences ``(T, T)``, in fp64."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    around = centre.reshape(-1)
    norms = torch.zeros(len(flat), dtype=torch.float64)
    inner = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for first in range(0, len(around), _CHUNK):
        parts = [one[first : first + _CHUNK].to("cpu", torch.float64) for one in flat]
        wide = torch.stack(parts)
        norms += wide.square().sum(dim=1)
        wide -= around[first : first + _CHUNK].cpu()
        inner += wide @ wide.mT
    return norms, inner


def _centred(inner: Tensor, shares: Sequence[float]) -> Tensor:
    """Inner products of the same vectors less their weighted mean."""
    own = torch.tensor(shares, dtype=inner.dtype)
    rows = inner - own @ inner
    return rows - (rows @ own)[:, None]


def _differences(
    name: str,
    tensors: Sequence[Tensor],
    centre: Tensor,
    shape: tuple[int, int, int],
    settings: CartSettings,
    rounding: Sequence[Tensor],
    inner: Tensor,
    exact: Mapping[int, Difference],
) -> Differences:
    parts, energies = [], []
    svd, rule = settings.solver, settings.rule
    if min(shape[1:]) >= _SKETCHED:
        # From a base `cart_auto` takes more of them than anything is said of, anyway.
        svd, rank = "sketch", rank_of(settings, shape)
        rule = RankRule(rank=max(rank, math.ceil(_MARGIN * rank_of(ALONE, shape))))
    for index, tensor in enumerate(tensors):
        if index in exact:
            left, right = (one.to(centre) for one in exact[index])
            whole = decomposed(left, right.mT)
            parts.append(whole)
            energies.append(whole.S.double().square().sum(dim=-1).cpu())
            continue
        delta = (tensor - centre).reshape(shape)
        seed = tensor_seed(settings.seed, name)
        parts.append(truncated_svd(delta, rule, svd=svd, seed=seed))
        energies.append(total_energy(delta).cpu())
    return Differences(parts, torch.stack(energies), torch.stack(list(rounding)), inner)


def of_factors(
    name: str,
    shape: tuple[int, int, int],
    differences: Sequence[Difference],
    merged: Difference | None = None,
    norms: Tensor | None = None,
    weights: Sequence[float] | None = None,
    *,
    is_table: bool = False,
) -> Weight | Plain:
    """What adapters make of a weight, from their factors: no matrix of its size is formed.

    Args:
        name: the weight's.
        shape: of it, ``(stack, m, n)``.
        differences: one an adapter, in fp32 or better.
        merged: that of a merged adapter, which is judged.
        norms: of the base's weight, squared, if it is known: ``()``.
        weights: how much each adapter counts in merges; None for alike.
        is_table: its rows are tokens.

    Raises:
        CartError: weights that sum to nothing.
    """
    every = Span([*differences, *([] if merged is None else [merged])])
    count = len(differences)
    shares = normalised(weights, count, f"tensor {name!r}")
    span = every.first(count)
    parts = span.parts
    with torch.no_grad():
        # In coordinates: small.
        dense = [part.dense().double() for part in parts]
        flat = torch.stack([one.reshape(-1) for one in dense])
        inner = (flat @ flat.mT).cpu()
        size = None if norms is None else norms.expand(count)
        of_weight = shape[1:] if shape[0] == 1 else shape
        if is_table or not is_decomposed(name, of_weight):
            return Plain(name, of_weight, size, inner)
        mean = sum((share * one for share, one in zip(shares, dense, strict=True)), 0 * dense[0])
        lacking = [(one - mean).to(parts[0].S.dtype) for one in dense]
        whole = RankRule(rank=min(mean.shape[-2:]))
        centred = [truncated_svd(one, whole, svd="exact") for one in lacking]

    def merges() -> Iterator[tuple[str, Tensor]]:
        yield AVERAGE, span.mean(shares)
        yield TASK_ARITHMETIC, SCALE * count * span.mean(shares)
        if count > 2:
            yield CART, merge_in_span(span, shares, CartSettings()).total
        if min(shares) >= 0:  # `cart_auto` takes no others
            with_base = merge_in_span(span, shares, INFORMED).total
            are_few = sum(share > 0 for share in shares) <= MOST_INFORMED
            if count > 2:
                yield AUTO, merge_in_span(span, shares, ALONE).total if are_few else with_base
            if are_few:
                yield AUTO_WITH_BASE, with_base
        if merged is not None:
            yield MERGED, every.parts[-1].dense()

    def answer(index: int, inputs: Inputs) -> Heard:
        there = span.inputs(inputs.columns)
        with full_precision(there.device):
            return Heard(there, parts[index].dense() @ there)

    around = _exact(parts, inner)
    about = _exact(centred, _centred(inner, shares))
    return Weight(name, shape, shares, size, around, about, merges, answer)


def _exact(parts: list[LowRank], inner: Tensor) -> Differences:
    """Differences of which the factors are all."""
    energies = torch.stack([part.S.double().square().sum(dim=-1).cpu() for part in parts])
    return Differences(parts, energies, torch.zeros_like(energies), inner)
