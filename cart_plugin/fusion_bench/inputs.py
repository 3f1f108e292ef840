"""Inputs and heads of CLIP, GPT-2 and Flan-T5 pools: those of FusionBench's own AdaMerging.

Its classes load the batches and compute the predictions; the loop is
`cart_plugin.fusion_bench.adaptation.Adaptation.adapt`, for all pools.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig
from torch import Tensor, nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.adaptation import Adaptation
from cart_plugin.fusion_bench.unlabelled import LoadedPool, Unlabelled, check_not_empty


class FusionBenchInputs(Adaptation):
    """What the three have in common."""

    # A method of the pools that they are made for, and such a pool.
    needs: tuple[str, str] | None = None

    def check_pool(self, pool: BaseModelPool) -> None:
        """Also refuse a pool of another kind.

        Raises:
            CartError: as `Adaptation.check_pool`, or such a pool.
        """
        super().check_pool(pool)
        if self.needs is not None and not hasattr(pool, self.needs[0]):
            raise CartError(
                f"this method takes a pool such as {self.needs[1]}, got a {type(pool).__name__}"
            )

    @abstractmethod
    def source(self) -> Any:
        """FusionBench's algorithm."""

    def test_data(self, pool: BaseModelPool, task: str) -> Any:
        """A task's inputs."""
        return pool.load_test_dataset(task)

    def prepare_inputs(self, pool: BaseModelPool) -> None:
        """Set up FusionBench's algorithm, and its heads.

        Raises:
            CartError: a task has no test data.
        """
        data = {task: self.test_data(pool, task) for task in pool.model_names}
        check_not_empty(data)
        # Kept: when FusionBench's algorithms are collected, they close the loggers of the fabric.
        self._source = self.source()
        self._source.modelpool = LoadedPool(pool, data)
        self._source.fabric = self.fabric
        self._source.on_test_time_adaptation_start()

    def batches(self, task: str) -> Iterator[Any]:
        """Its shuffled batches."""
        return self._shuffled(type(self._source), task)

    def _shuffled(self, owner: Any, task: str, **loading: int) -> Iterator[Any]:
        # FusionBench 0.2.33 caches this method, by the algorithm, for the life of the process: the
        # loaders' processes and all data would outlive the run.
        uncached = inspect.unwrap(owner.get_shuffled_test_loader_iter)
        found: Iterator[Any] = uncached(self._source, task, **loading)
        return found

    def logits(self, model: nn.Module, batch: Any, task: str) -> Tensor:
        """Its predictions."""
        found: Tensor = self._source.compute_logits(model, batch, task)
        return found

    def _language_model_source(self, algorithm: Callable[..., Any]) -> Any:
        loading = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        # What only its own loop uses, it takes without a default all the same.
        unused = {"optimizer": DictConfig({}), "init_values": 0.0, "max_steps": self.max_steps}
        return algorithm(dataloader_kwargs=DictConfig(loading), **unused)


class ClipInputs(FusionBenchInputs):
    """Images of a CLIP pool, on zero-shot heads of the pretrained CLIP.

    FusionBench caches the heads in ``./outputs/cache`` by task and model path only: delete that
    folder when another model comes to lie in the same path.
    """

    needs = ("load_clip_model", "CLIPVisionModelPool")

    def check_pool(self, pool: BaseModelPool) -> None:
        """Also refuse a pool without the pretrained CLIP, whose text encoder makes the heads.

        Raises:
            CartError: as `FusionBenchInputs.check_pool`, no pretrained model, or a task whose class
                names FusionBench does not know.
        """
        super().check_pool(pool)
        if not pool.has_pretrained:
            raise CartError(
                "the zero-shot heads that CLIP is adapted on come from the pretrained model's "
                "text encoder: give the pool a _pretrained_"
            )
        from fusion_bench.tasks.clip_classification import get_classnames_and_templates

        for task in pool.model_names:
            try:
                get_classnames_and_templates(task)
            except Exception as error:  # an import, a lookup or an error of its own
                raise CartError(
                    f"FusionBench has no class names of a task {task}, for CLIP's zero-shot heads: "
                    "name each model after its data set, as in FusionBench's "
                    "clip-vit-base-patch32_TA8"
                ) from error

    def test_data(self, pool: BaseModelPool, task: str) -> Any:
        """A task's images, without labels."""
        return Unlabelled(super().test_data(pool, task))

    def source(self) -> Any:
        """FusionBench's layer-wise AdaMerging for CLIP."""
        from fusion_bench.method.adamerging.clip_layer_wise_adamerging import (
            CLIPLayerWiseAdaMergingAlgorithm,
        )

        source = CLIPLayerWiseAdaMergingAlgorithm(DictConfig({}))
        source.zeroshot_weights = {}  # 0.2.33 keeps all heads with the class
        return source

    def batches(self, task: str) -> Iterator[Any]:
        """Its shuffled batches."""
        from fusion_bench.mixins import CLIPClassificationMixin

        # The algorithm's own method is a cache around this one.
        loading = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return self._shuffled(CLIPClassificationMixin, task, **loading)

    def logits(self, model: nn.Module, batch: Any, task: str) -> Tensor:
        """Its predictions, of images without their labels."""
        return super().logits(model, batch[0], task)


class GPT2Inputs(FusionBenchInputs):
    """Texts of a GPT-2 pool, on the fine-tuned models' own ``score`` heads.

    FusionBench reads the last token before GPT-2's own padding, 50256.
    """

    needs = ("load_classifier", "GPT2ForSequenceClassificationPool")

    def source(self) -> Any:
        """FusionBench's layer-wise AdaMerging for GPT-2."""
        from fusion_bench.method.adamerging.gpt2_layer_wise_adamerging import (
            GPT2LayerWiseAdaMergingAlgorithm,
        )

        return self._language_model_source(GPT2LayerWiseAdaMergingAlgorithm)


class FlanT5Inputs(FusionBenchInputs):
    """Texts of a Flan-T5 pool, on the token that follows T5's end of sequence.

    FusionBench starts the decoder with that one, not with the token that T5 starts with.
    """

    def source(self) -> Any:
        """FusionBench's layer-wise AdaMerging for Flan-T5."""
        from fusion_bench.method.adamerging.flan_t5_layer_wise_adamerging import (
            FlanT5LayerWiseAdaMergingAlgorithm,
        )

        return self._language_model_source(FlanT5LayerWiseAdaMergingAlgorithm)
