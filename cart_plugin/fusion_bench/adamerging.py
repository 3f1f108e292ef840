r"""CART + AdaMerging for FusionBench's CLIP, GPT-2 and Flan-T5 pools.

The coefficients of the truncated centred task vectors start at ``scaling_factor`` and are adapted
to low entropy of the predictions on unlabelled test batches. Eight CLIP models::

    fusion_bench method=cart/adamerging method.decompose=clip method.rank_ratio=0.12 \
        method.scaling_factor=2.0 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

One coefficient a task rather than one a task and parameter: ``method.granularity=task``. The
adapted coefficients again, without adaptation::

    fusion_bench method=cart/adamerging method.decompose=clip method.rank_ratio=0.12 \
        method.merging_weights_load_path=$PWD/merging_weights.pt \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

GPT-2 and Flan-T5 on GLUE::

    fusion_bench method=cart/adamerging_gpt2 method.decompose=gpt2 method.rank_ratio=0.01 \
        method.scaling_factor=1.3 modelpool=cart/gpt-2_glue_tta taskpool=gpt-2_glue
    fusion_bench method=cart/adamerging_flan_t5 \
        modelpool=Seq2SeqLMPool/flan-t5-base_glue_tta taskpool=flan-t5_glue_text_generation

Image classification pools: `cart_plugin.fusion_bench.image_adamerging`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, LightningFabricMixin
from fusion_bench.mixins import SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig
from torch import nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench import compat
from cart_plugin.fusion_bench.base import CartBase
from cart_plugin.fusion_bench.vectors import (
    GRANULARITIES,
    LayerWise,
    TaskWise,
    cart_parts,
    load_coefficients,
    save_coefficients,
    wrapped,
)

compat.prepare()


class AdaMerging(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """What all AdaMerging methods here share: build, adapt or reload coefficients, merge.

    Args:
        granularity: ``layer`` for a coefficient per task and parameter, ``task`` for one per task.
        max_steps: steps of Adam, each over one batch of every task; 0 for none.
        lr: Adam's learning rate.
        batch_size: inputs in a batch.
        num_workers: processes that load a task's batches.
        merging_weights_load_path: coefficients to merge with, without adaptation: those of a run
            with the same models, granularity and decomposition.
        merging_weights_save_path: where to save the coefficients; a bare name goes to the log
            folder.
        **kwargs: parameters of the method that is adapted.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {
        name: name
        for name in (
            *("granularity", "max_steps", "lr", "batch_size", "num_workers"),
            *("merging_weights_load_path", "merging_weights_save_path"),
        )
    }
    modelpool: BaseModelPool
    seed: int  # also of the order of the batches

    def __init__(
        self,
        granularity: str = "layer",
        max_steps: int = 1000,
        lr: float = 1e-3,
        batch_size: int = 16,
        num_workers: int = 0,
        merging_weights_load_path: str | None = None,
        merging_weights_save_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if granularity not in GRANULARITIES:
            raise CartError(f"granularity must be layer or task, got {granularity!r}")
        if not isinstance(max_steps, int) or max_steps < 0:
            raise CartError(f"max_steps must be a whole number from 0 on, got {max_steps!r}")
        self.granularity, self.max_steps, self.lr = granularity, max_steps, lr
        self.batch_size, self.num_workers = batch_size, num_workers
        self.merging_weights_load_path = merging_weights_load_path
        self.merging_weights_save_path = merging_weights_save_path

    @property
    def adapts(self) -> bool:
        """Whether this run adapts coefficients, rather than taking those of a file or the first."""
        return self.merging_weights_load_path is None and self.max_steps > 0

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """Merge the models of a pool.

        Returns:
            The merged model, with the adapted coefficients.

        Raises:
            CartError: no test data to adapt to, a file of coefficients that does not fit, and as
                the method that is adapted.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        self.modelpool = pool
        saved = self.merging_weights_load_path and Path(self.merging_weights_load_path)
        if saved and not saved.is_file():
            raise CartError(f"merging_weights_load_path: there is no file {saved}")
        if self.adapts:
            self.check_pool(pool)
        with self.profile("construct the wrapped model"), torch.no_grad():
            module = self.construct(pool)
        if saved:
            module.merge_weight.data = load_coefficients(saved, module.merge_weight.shape)
        if self.adapts:
            with self.profile("test-time adaptation"), torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.adapt(module, pool)
        if self.merging_weights_save_path is not None and self.fabric.is_global_zero:
            save_coefficients(self._save_path(), module.merge_weight)
        self.print_profile_summary()
        with torch.no_grad():
            return module.merge_and_unload()

    def check_pool(self, pool: BaseModelPool) -> None:
        """Refuse a pool that has nothing to adapt to, before its models are loaded.

        Raises:
            CartError: a model without test data.
        """
        missing = [name for name in pool.model_names if name not in pool.test_dataset_names]
        if missing:
            raise CartError(
                f"AdaMerging adapts to test inputs (not to labels), but the pool has none for "
                f"{', '.join(missing)}: add them to its test_datasets, under the models' names"
            )

    @abstractmethod
    def construct(self, pool: BaseModelPool) -> LayerWise | TaskWise:
        """The merged model before its coefficients are adapted."""

    @abstractmethod
    def adapt(self, module: LayerWise | TaskWise, pool: BaseModelPool) -> None:
        """Adapt the coefficients of a merged model in place."""

    def _save_path(self) -> Path:
        given = str(self.merging_weights_save_path)
        if given.startswith(("/", ".")) or self.log_dir is None:
            return Path(given)
        return Path(self.log_dir) / given


class CartAdaMerging(AdaMerging, CartBase):
    """CART + AdaMerging with the adaptation of one of FusionBench's own algorithms.

    Args:
        **kwargs: parameters of `AdaMerging` and of `CartBase`; the coefficients start at
            ``scaling_factor`` and are not clamped.
    """

    _config_mapping = CartBase._config_mapping | AdaMerging._config_mapping

    def construct(self, pool: BaseModelPool) -> LayerWise | TaskWise:
        """The merged model of ``method=cart``, as the average plus task vectors."""
        fleet = self.load(pool)
        parts = cart_parts(fleet, self.settings)
        model = fleet.with_tensors(fleet.names[0], parts.centre)
        return wrapped(model, parts.vectors, parts.start, self.granularity)

    def adapt(self, module: LayerWise | TaskWise, pool: BaseModelPool) -> None:
        """Adapt with FusionBench's heads, batches and layer-wise loop.

        The layer-wise loop does both granularities: the task-wise one of FusionBench 0.2.33 goes
        by ``self._fabric``, which no longer exists.
        """
        # Kept: when FusionBench's algorithms are collected, they close the loggers of the fabric.
        self._adaptation = self.adaptation()
        self._adaptation.modelpool = pool
        self._adaptation.fabric = self.fabric
        self._adaptation.test_time_adaptation(module)

    @abstractmethod
    def adaptation(self) -> Any:
        """FusionBench's algorithm whose ``test_time_adaptation`` is used."""

    def _language_model_adaptation(self, algorithm: Callable[..., Any]) -> Any:
        return algorithm(
            optimizer=DictConfig(
                {"_target_": "torch.optim.Adam", "lr": self.lr, "betas": [0.9, 0.999]}
            ),
            dataloader_kwargs=DictConfig(
                {"batch_size": self.batch_size, "num_workers": self.num_workers}
            ),
            init_values=self.scaling_factor,
            max_steps=self.max_steps,
        )


class CartCLIPAdaMergingAlgorithm(CartAdaMerging):
    """CART + AdaMerging for CLIP pools, on zero-shot heads of the pretrained CLIP.

    FusionBench caches the heads in ``./outputs/cache`` by task and model path only: delete that
    folder when another model comes to lie in the same path.
    """

    def check_pool(self, pool: BaseModelPool) -> None:
        """Also refuse a pool without the pretrained CLIP, whose text encoder makes the heads.

        Raises:
            CartError: as `AdaMerging.check_pool`, or no pretrained model.
        """
        super().check_pool(pool)
        if not pool.has_pretrained:
            raise CartError(
                "the zero-shot heads that CLIP is adapted on come from the pretrained model's "
                "text encoder (its weights are not merged): give the pool a _pretrained_"
            )

    def adaptation(self) -> Any:
        """FusionBench's layer-wise AdaMerging for CLIP, whose Adam has the default betas."""
        from fusion_bench.method.adamerging.clip_layer_wise_adamerging import (
            CLIPLayerWiseAdaMergingAlgorithm,
        )

        names = ("max_steps", "lr", "batch_size", "num_workers")
        config = {"optimizer": "adam"} | {name: getattr(self, name) for name in names}
        return CLIPLayerWiseAdaMergingAlgorithm(DictConfig(config))


class CartGPT2AdaMergingAlgorithm(CartAdaMerging):
    """CART + AdaMerging for GPT-2 pools, on the fine-tuned models' own ``score`` heads."""

    def adaptation(self) -> Any:
        """FusionBench's layer-wise AdaMerging for GPT-2."""
        from fusion_bench.method.adamerging.gpt2_layer_wise_adamerging import (
            GPT2LayerWiseAdaMergingAlgorithm,
        )

        return self._language_model_adaptation(GPT2LayerWiseAdaMergingAlgorithm)


class CartFlanT5AdaMergingAlgorithm(CartAdaMerging):
    """CART + AdaMerging for Flan-T5 pools, on the first generated token."""

    def adaptation(self) -> Any:
        """FusionBench's layer-wise AdaMerging for Flan-T5."""
        from fusion_bench.method.adamerging.flan_t5_layer_wise_adamerging import (
            FlanT5LayerWiseAdaMergingAlgorithm,
        )

        return self._language_model_adaptation(FlanT5LayerWiseAdaMergingAlgorithm)
