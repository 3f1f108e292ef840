"""CART-Indexing of one tensor: each model as the common centre and a low-rank difference.

The paper's compression (arXiv 2412.12153, section 4): keep the average once, and of every task its
own truncated difference; at inference task t runs on ``centre + lambda * SVD_k(W_t - centre)``.
What is not decomposed (norms, biases, embeddings) keeps its whole difference. Whole checkpoints, as
a base and standard PEFT adapters, are the work of `cart_plugin.compress`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.spectra import spectrum
from cart_plugin.merging.differences import centre_of, factors_of
from cart_plugin.merging.inputs import check_centre, check_finite, check_inputs, normalised
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed, matrix_shape


@dataclass(frozen=True)
class IndexedTensor:
    """One tensor of several models: what they share, and what each has of its own.

    Attributes:
        centre: the shared part, in fp32 (fp64 for fp64 inputs).
        differences: one a model: factors of its truncated difference, or the whole difference
            where the tensor is not decomposed.
    """

    centre: Tensor
    differences: tuple[LowRank | Tensor, ...]

    def difference(self, index: int) -> Tensor:
        """What a model adds to the centre, dense, in the centre's shape and dtype."""
        found = self.differences[index]
        if isinstance(found, LowRank):
            return found.dense().view(self.centre.shape)
        return found

    def restored(self, index: int, lambda_: float = 1.0) -> Tensor:
        """A model's tensor, ``centre + lambda * difference``.

        What is not decomposed has its whole difference, so that it comes back as it was.
        """
        exact = isinstance(self.differences[index], Tensor)
        return self.centre + (1.0 if exact else lambda_) * self.difference(index)

    @property
    def stored(self) -> int:
        """Numbers to store for all models: the centre, and each difference in its smaller form."""
        dense = self.centre.numel()
        total = dense
        for found in self.differences:
            if isinstance(found, LowRank):
                total += min(dense, found.U.numel() + found.Vh.numel())
            else:
                total += dense
        return total


def index_tensors(
    tensors: Sequence[Tensor],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    name: str | None = None,
    models: Sequence[str] | None = None,
    decompose: bool | None = None,
    ranks: Sequence[int] | None = None,
) -> IndexedTensor:
    """Split the versions of one tensor into a shared centre and a difference each.

    Args:
        tensors: one a model, all of one shape, on one device. At least two.
        settings: rank rule, centre and solver; the defaults if None. ``lambda_`` belongs to
            `IndexedTensor.restored`.
        weights: one a model, of the mean; equal if None.
        base: the base model's tensor; needed by ``center="base"`` only.
        name: the tensor's name: decides what it is (`merging.is_decomposed`) and its seed.
        models: the models' names, for errors.
        decompose: overrides `merging.is_decomposed`.
        ranks: one a model, in the place of the settings' rank rule (`cart_plugin.compress.ranks`
            chooses them); of no meaning where the tensor is not decomposed.

    Returns:
        The centre and the differences; at rank 0 every model ends at the centre.

    Raises:
        CartError: as `merging.merge_tensors`.
    """
    settings = settings or CartSettings()
    models, where = check_inputs(tensors, models, name)
    check_centre(base, settings.center, where)
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        centre, deltas = _around_centre(tensors, settings, weights, base, models, where)
        if decompose is None:
            decompose = is_decomposed(name, centre.shape)
        if not decompose or centre.numel() == 0:
            return IndexedTensor(centre, tuple(deltas))
        shape = matrix_shape(name, centre.shape)
        if ranks is None:
            rules = [settings.plain_rule] * len(tensors)
        else:
            rules = [RankRule(rank=rank) for rank in ranks]
        parts = [
            factors_of(delta.reshape(shape), rule, name, svd=settings.svd, seed=settings.seed)
            for delta, rule in zip(deltas, rules, strict=True)
        ]
        return IndexedTensor(centre, tuple(parts))


def spectra_of(
    tensors: Sequence[Tensor],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    name: str | None = None,
    models: Sequence[str] | None = None,
) -> list[Tensor]:
    """Squared singular values of each model's difference: what `cart_plugin.compress.ranks` takes.

    Args and errors are those of `index_tensors`, for a tensor that is decomposed.

    Returns:
        One a model, descending, in fp64 on the CPU; of a stack of matrices their sums.
    """
    settings = settings or CartSettings()
    models, where = check_inputs(tensors, models, name)
    check_centre(base, settings.center, where)
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        centre, deltas = _around_centre(tensors, settings, weights, base, models, where)
        shape = matrix_shape(name, centre.shape)
        return [spectrum(delta.reshape(shape)) for delta in deltas]


def _around_centre(
    tensors: Sequence[Tensor],
    settings: CartSettings,
    weights: Sequence[float] | None,
    base: Tensor | None,
    models: Sequence[str],
    where: str,
) -> tuple[Tensor, Iterator[Tensor]]:
    """The centre, and each model's difference from it when it is due."""
    shares = normalised(weights, len(tensors), where)
    around = base if settings.center == "base" else None
    centre = centre_of(tensors, shares, around, models, where)

    def differences() -> Iterator[Tensor]:
        for tensor, model in zip(tensors, models, strict=True):
            delta = tensor - centre
            check_finite(delta, [model], [tensor], where)
            yield delta

    return centre, differences()


def stored_share(stored: int, models: int, numbers: int) -> float:
    """Stored numbers as a share of ``models`` full models of ``numbers`` each."""
    return stored / (models * numbers) if numbers else math.nan
