"""CART-Indexing: each fine-tuned model as the common centre and a difference of low rank.

The paper's compression (arXiv 2412.12153, section 4): keep the average once, and of every task its
own truncated difference; at inference task t runs on ``centre + lambda * SVD_k(W_t - centre)``.
What is not decomposed (norms, biases, embeddings) keeps its whole difference.

Here is one tensor's arithmetic. Whole checkpoints, as a base and standard PEFT adapters, are the
work of `cart_plugin.compress`, whose functions are names of this module, too, loaded on first use::

    from cart_plugin.indexing import compress, expand, load_task, task_tensors, tasks

    compress(["mistral-math", "mistral-code", "mistral-german"], "served", rank_ratio=0.04)
    tasks("served")                                      # the adapters' names
    weights = load_task("served", "mistral-math")        # one task's state dict
    for name, tensor in task_tensors("served", "mistral-math"): ...     # a tensor at a time
    expand("served", "mistral-math", "mistral-math-again")              # its full checkpoint
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cart_plugin.inputs import check_finite, check_inputs, normalised
from cart_plugin.lowrank import LowRank
from cart_plugin.merging import CartSettings, centre_of, is_decomposed, truncated

if TYPE_CHECKING:
    from cart_plugin.compress.expand import expand, load_task, task_tensors, tasks
    from cart_plugin.compress.run import compress

__all__ = [
    "IndexedTensor",
    "compress",
    "expand",
    "index_tensors",
    "load_task",
    "stored_share",
    "task_tensors",
    "tasks",
]

_HOME_OF = {
    "compress": "run",
    "expand": "expand",
    "load_task": "expand",
    "task_tensors": "expand",
    "tasks": "expand",
}


def __getattr__(name: str) -> object:
    # Not imported above: that package uses transformers and PEFT, and this arithmetic.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cart_plugin.compress.{_HOME_OF[name]}"), name)


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

    Returns:
        The centre and the differences; at rank 0 every model ends at the centre.

    Raises:
        CartError: as `merging.merge_tensors`.
    """
    settings = settings or CartSettings()
    models = list(models) if models is not None else [str(i) for i in range(len(tensors))]
    where = f"tensor {name!r}" if name is not None else "tensor"
    check_inputs(tensors, models, base, settings.center, where)
    if decompose is None:
        decompose = is_decomposed(name, tensors[0].shape)
    decompose = decompose and tensors[0].numel() > 0
    differences: list[LowRank | Tensor] = []
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        shares = normalised(weights, len(tensors), where)
        around = base if settings.center == "base" else None
        centre = centre_of(tensors, shares, around, models, where)
        for tensor, model in zip(tensors, models, strict=True):
            delta = tensor - centre
            check_finite(delta, [model], [tensor], where)
            differences.append(truncated(delta, settings, name) if decompose else delta)
    return IndexedTensor(centre, tuple(differences))


def stored_share(stored: int, models: int, numbers: int) -> float:
    """Stored numbers as a share of ``models`` full models of ``numbers`` each."""
    return stored / (models * numbers) if numbers else math.nan
