r"""CART for any model pool of FusionBench.

Merge eight CLIP models and evaluate them::

    fusion_bench method=cart method.decompose=clip method.rank_ratio=0.12 \
        method.scaling_factor=2.0 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

The paper's ablation, low-rank task arithmetic around the pretrained model::

    fusion_bench method=cart/uncentered method.decompose=clip method.scaling_factor=0.3 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

CART-Indexing, the compressed models one by one::

    fusion_bench method=cart/indexing method.decompose=clip method.rank_ratio=0.04 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

The same in a fifth of the models' numbers, with ranks that lose the least::

    fusion_bench method=cart/indexing method.decompose=clip method.target_size=0.2 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.wrappers.switch import SwitchModule
from torch import Tensor, nn

from cart_plugin.compress.ranks import Matrices, by_size, checked_rule
from cart_plugin.errors import CartError, CartWarning
from cart_plugin.fusion_bench.base import CartBase, as_pool
from cart_plugin.fusion_bench.fleet import Fleet, copied
from cart_plugin.fusion_bench.parameters import check_tasks
from cart_plugin.merging.indexing import index_tensors, spectra_of, stored_share
from cart_plugin.merging.inputs import check_range
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.state_dicts import merge_state_dicts
from cart_plugin.merging.tensors import matrix_shape


class CartAlgorithm(CartBase):
    """CART (arXiv 2412.12153): average + scaling_factor * sum of truncated centred task vectors.

    Needs no pretrained model.

    Args:
        return_single_task_models: also return each model as the centre plus its own truncated
            task vector (not scaled), as `TaskSingularVectorMerging` does.
        **kwargs: parameters of `CartBase`.
    """

    takes_auto = True
    _config_mapping = CartBase._config_mapping | {
        "return_single_task_models": "return_single_task_models"
    }

    def __init__(self, return_single_task_models: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.return_single_task_models = return_single_task_models

    @torch.no_grad()
    def run(
        self, modelpool: BaseModelPool | dict[str, nn.Module]
    ) -> nn.Module | dict[str, nn.Module]:
        """Merge the models of a pool.

        Returns:
            A model with the merged weights: the first of the pool, or a copy of it where the pool
            holds models rather than their places. With ``return_single_task_models``, a
            dictionary of the models by name, and the merged one as ``merged``.

        Raises:
            CartError: see `CartBase.load` and `cart_plugin.merging.state_dicts.merge_state_dicts`.
        """
        if self.return_single_task_models:
            self.check_not_saved()
        fleet = self.load(modelpool)
        first = fleet.names[0]
        merged: dict[str, Tensor] = {}
        single: dict[str, dict[str, Tensor]] = {}
        if self.return_single_task_models:
            single = {name: {} for name in fleet.names}
        kept = Kept()
        with self.profile("merge weights"):
            for name, tensors in fleet.tensors("CART"):
                base = fleet.base_tensor(name)
                part = merge_state_dicts(
                    {model: {name: tensor} for model, tensor in tensors.items()},
                    self.settings,
                    weights=fleet.weights,
                    base=None if base is None else {name: base},
                    decompose=fleet.decompose,
                    kept=kept,
                    turned=fleet.turned,
                )
                merged[name] = fleet.at_home(name, part[name], tensors[first].dtype)
                if single:
                    _restore(name, tensors, base, fleet, self.settings, 1.0, single)
        self.print_profile_summary()
        if text := kept.warning():
            warnings.warn(text, CartWarning, stacklevel=2)
        if not single:
            return fleet.with_tensors(first, merged)
        whole = copied(fleet.with_tensors(first, merged))
        models = {name: fleet.with_tensors(name, single.pop(name)) for name in fleet.names}
        return {**models, "merged": whole}


class CartUncenteredAlgorithm(CartAlgorithm):
    """Low-rank task arithmetic around the pretrained model: the paper's uncentred ablation.

    pretrained + scaling_factor * sum of truncated task vectors; what is not decomposed is averaged.
    """

    center = "base"


class CartIndexingAlgorithm(CartBase):
    """CART-Indexing: every model as the average plus its own truncated task vector.

    Args:
        target_size: in the place of a rank rule, the share of all models' numbers that centre and
            differences may take: the ranks of all matrices and models are chosen together, by one
            threshold, for the least squared error (`cart_plugin.compress.ranks.by_size`). The
            models are then read twice.
        switch: return one module that holds all models and shows the one that a task pool asks
            for (`fusion_bench.models.wrappers.switch`), so that each is evaluated on its own task
            only. Task pools that do not switch evaluate every model on every task without it.
        **kwargs: parameters of `CartBase`.
    """

    _config_mapping = CartBase._config_mapping | {"target_size": "target_size", "switch": "switch"}

    def __init__(
        self, target_size: float | None = None, switch: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.target_size, self.switch = target_size, switch
        checked_rule(self.rank_ratio, self.rank, self.energy, target_size)

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> dict[str, Any]:
        """Compress the models of a pool.

        Returns:
            The restored models by name (with ``switch``, as one module ``indexed``), and
            ``storage``: numbers to store, and their share of all models' numbers.

        Raises:
            CartError: see `CartBase.load` and `cart_plugin.merging.indexing.index_tensors`; the
                target size is too small for the centre and what is not decomposed; or models have
                names that a switch cannot tell apart.
        """
        self.check_not_saved()
        pool = as_pool(modelpool)
        if self.switch:
            check_tasks(pool.model_names)
        fleet = self.load(pool)
        ranks: dict[str, list[int]] = {}
        if self.target_size is not None:
            with self.profile("choose ranks"):
                ranks = _ranks_by_size(fleet, self.settings, self.target_size)
        restored: dict[str, dict[str, Tensor]] = {name: {} for name in fleet.names}
        stored = numbers = 0
        settings, scale = self.settings, float(self.scaling_factor)
        with self.profile("index weights"):
            for name, tensors in fleet.tensors("CART-Indexing"):
                base, chosen = fleet.base_tensor(name), ranks.get(name)
                stored += _restore(name, tensors, base, fleet, settings, scale, restored, chosen)
                numbers += tensors[fleet.names[0]].numel()
        self.print_profile_summary()
        models = {name: fleet.with_tensors(name, restored.pop(name)) for name in fleet.names}
        storage = {
            "stored_parameters": stored,
            "parameters_of_all_models": len(models) * numbers,
            "share": stored_share(stored, len(models), numbers),
        }
        if self.switch:
            return {"indexed": SwitchModule(models), "storage": storage}
        return {**models, "storage": storage}


def _restore(
    name: str,
    tensors: Mapping[str, Tensor],
    base: Tensor | None,
    fleet: Fleet,
    settings: CartSettings,
    scale: float,
    restored: Mapping[str, dict[str, Tensor]],
    ranks: Sequence[int] | None = None,
) -> int:
    """Restore one tensor of all models from the centre and what CART keeps of each.

    Returns:
        How many numbers centre and differences take.
    """
    first = tensors[fleet.names[0]]
    if not first.is_floating_point():  # buffers: each model keeps its own
        for model, tensor in tensors.items():
            restored[model][name] = tensor.to(fleet.home(name))
        return len(tensors) * first.numel()
    indexed = index_tensors(
        list(tensors.values()),
        settings,
        weights=fleet.weights,
        base=base,
        name=name,
        models=list(tensors),
        decompose=fleet.decompose(name, first.shape),
        ranks=ranks,
    )
    for index, (model, tensor) in enumerate(tensors.items()):
        whole = indexed.restored(index, scale).to(fleet.home(name), tensor.dtype)
        check_range(whole, f"tensor {name!r} of {model}")
        restored[model][name] = whole
    return indexed.stored


def _ranks_by_size(fleet: Fleet, settings: CartSettings, share: float) -> dict[str, list[int]]:
    """Ranks with which all models take a share of their numbers, at the least squared error.

    Returns:
        One rank a model, by the tensor's name, of all that is decomposed.

    Raises:
        CartError: the centre and what is not decomposed take more than that.
    """
    count = len(fleet.names)
    matrices: list[Matrices] = []
    spectra: list[dict[str, Tensor]] = [{} for _ in fleet.names]
    fixed = numbers = 0
    for name, tensors in fleet.tensors("CART-Indexing spectra"):
        first = tensors[fleet.names[0]]
        numbers += first.numel()
        if not first.is_floating_point():
            fixed += count * first.numel()  # buffers have no centre
        elif not fleet.decompose(name, first.shape) or not first.numel():
            fixed += (1 + count) * first.numel()
        else:
            fixed += first.numel()
            matrices.append(Matrices(name, matrix_shape(name, first.shape)))
            found = spectra_of(
                list(tensors.values()),
                settings,
                weights=fleet.weights,
                base=fleet.base_tensor(name),
                name=name,
                models=fleet.names,
            )
            for held, values in zip(spectra, found, strict=True):
                held[name] = values

    def size(ranks: Sequence[Mapping[str, int]]) -> int:
        # As `IndexedTensor.stored` counts: never more than the dense differences.
        costs = (
            min(math.prod(one.matrices), chosen[one.name] * one.direction)
            for chosen in ranks
            for one in matrices
        )
        return fixed + sum(costs)

    # The share that an earlier run has reported is met again, whatever its rounding.
    target = int(share * count * numbers * (1 + 1e-12))
    chosen = by_size(matrices, spectra, {one.name: 1 for one in matrices}, size, target)
    if size(chosen) > target:
        raise CartError(
            f"the centre and what is not decomposed take {fixed:,} numbers alone, but target_size="
            f"{share} allows {target:,} of {count * numbers:,}; give a larger one"
        )
    return {
        one.name: [_rank_for_price(one, ranks[one.name]) for ranks in chosen] for one in matrices
    }


def _rank_for_price(one: Matrices, rank: int) -> int:
    """The highest rank that costs no more: full where factors are no smaller than the matrix."""
    stack, m, n = one.matrices
    return rank if rank * one.direction < stack * m * n else min(m, n)
