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
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.wrappers.switch import SwitchModule
from torch import Tensor, nn

from cart_plugin.fusion_bench.base import CartBase, Fleet, copied
from cart_plugin.indexing import index_tensors, stored_share
from cart_plugin.merging import CartSettings, merge_state_dicts


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
            CartError: see `CartBase.load` and `cart_plugin.merging.merge_state_dicts`.
        """
        if self.return_single_task_models:
            self.check_not_saved()
        fleet = self.load(modelpool)
        first = fleet.names[0]
        merged: dict[str, Tensor] = {}
        single: dict[str, dict[str, Tensor]] = {}
        if self.return_single_task_models:
            single = {name: {} for name in fleet.names}
        with self.profile("merge weights"):
            for name, tensors in fleet.tensors("CART"):
                base = fleet.base_tensor(name)
                part = merge_state_dicts(
                    {model: {name: tensor} for model, tensor in tensors.items()},
                    self.settings,
                    weights=fleet.weights,
                    base=None if base is None else {name: base},
                    decompose=fleet.decompose,
                )
                merged[name] = part[name].to(fleet.home(name))
                if single:
                    _restore(name, tensors, fleet, self.settings, 1.0, single)
        self.print_profile_summary()
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
        switch: return one module that holds all models and shows the one that a task pool asks
            for (`fusion_bench.models.wrappers.switch`), so that each is evaluated on its own task
            only. Task pools that do not switch evaluate every model on every task without it.
        **kwargs: parameters of `CartBase`.
    """

    _config_mapping = CartBase._config_mapping | {"switch": "switch"}

    def __init__(self, switch: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.switch = switch

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> dict[str, Any]:
        """Compress the models of a pool.

        Returns:
            The restored models by name (with ``switch``, as one module ``indexed``), and
            ``storage``: numbers to store, and their share of all models' numbers.

        Raises:
            CartError: see `CartBase.load` and `cart_plugin.indexing.index_tensors`.
        """
        self.check_not_saved()
        fleet = self.load(modelpool)
        restored: dict[str, dict[str, Tensor]] = {name: {} for name in fleet.names}
        stored = numbers = 0
        with self.profile("index weights"):
            for name, tensors in fleet.tensors("CART-Indexing"):
                stored += _restore(
                    name, tensors, fleet, self.settings, float(self.scaling_factor), restored
                )
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
    fleet: Fleet,
    settings: CartSettings,
    scale: float,
    restored: Mapping[str, dict[str, Tensor]],
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
        base=fleet.base_tensor(name),
        name=name,
        models=list(tensors),
        decompose=fleet.decompose(name, first.shape),
    )
    for index, (model, tensor) in enumerate(tensors.items()):
        whole = indexed.restored(index, scale)
        restored[model][name] = whole.to(fleet.home(name), tensor.dtype)
    return indexed.stored
