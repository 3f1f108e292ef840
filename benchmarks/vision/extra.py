"""What the suite adds to FusionBench: missing methods, and a task pool that evaluates in bf16.

The methods are those that it lacks for image encoders, or has only in a form that takes hours.
Named by the suite's commands: `fusion_bench ... method._target_=benchmarks.vision.extra.X`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm
from fusion_bench.models.wrappers.switch import SwitchModule
from fusion_bench.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common.algorithms import GramWUDI, added, merged  # noqa: F401 - commands name it
from benchmarks.common.doge import learned_delta
from benchmarks.common.peers import ace, aswudi, dc_merge, svc, swudi
from cart_plugin.fusion_bench.taskpool import ImageClassificationTaskPool


class TaskPool(ImageClassificationTaskPool):
    """The plugin's task pool, in the precision of choice.

    Args:
        *args: as of the plugin's.
        precision: `fp32`, or `bf16`: three times as fast on processors with AMX, and within a
            point of fp32 in the mean. Settings are chosen in it; what is reported is fp32.
        **kwargs: as of the plugin's.
    """

    def __init__(self, *args: Any, precision: str = "fp32", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision = precision

    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Accuracy and loss by task, and their averages."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return super().evaluate(model, name=name, **kwargs)


class Individual(BaseAlgorithm):
    """No merge: each task is served by its own fine-tuned model."""

    def run(self, modelpool: BaseModelPool) -> SwitchModule:
        """All models of the pool as one that switches."""
        return SwitchModule(dict(modelpool.named_models()))


class ImageRegMean(RegMeanAlgorithm):
    """FusionBench's RegMean with the inner products of image batches of the pool.

    RegMean's mathematics is all in FusionBench's base class, which leaves open where a layer's
    inputs come from; it has that for CLIP and GPT-2 only.
    """

    batch = 64

    @torch.no_grad()
    def get_regmean_weights(
        self,
        model_name: str,  # noqa: ARG002 - FusionBench passes it
        model: nn.Module,
        train_dataset: Any,
        linear_modules_to_merge: Mapping[str, nn.Module],
    ) -> dict[str, Tensor]:
        """Mean of x x^T over the inputs x of each linear layer, by layer name."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        with _inputsadded(linear_modules_to_merge, sums, counts):
            for images, _ in self._batches(train_dataset):
                model(images)
        return {name: total / counts[name] for name, total in sums.items()}

    def _batches(self, dataset: Any) -> Iterator[Any]:
        wanted = self.num_regmean_examples
        for batch in DataLoader(dataset, batch_size=min(self.batch, wanted)):
            yield batch
            wanted -= len(batch[0])
            if wanted <= 0:
                return


@contextmanager
def _inputsadded(
    layers: Mapping[str, nn.Module], sums: dict[str, Tensor], counts: dict[str, int]
) -> Iterator[None]:
    """While open, every pass through a layer adds its inputs' outer products and their number."""

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Peer(BaseAlgorithm):
    """A method of `benchmarks.common.peers`, on whole encoders.

    As their authors do, matrices are merged by the method, all else (biases, norms, position
    embeddings, convolution kernels) is averaged, and both are scaled. For ACE this is a guess: the
    paper's accounts that could be read do not say.

    Args:
        rule: the method's name.
        scaling_factor: of what is added to the base.
        **options: the method's own.
    """

    rules: Mapping[str, Callable[..., Tensor]] = {
        "aswudi": aswudi,
        "swudi": swudi,
        "ace": ace,
        "dc_merge": dc_merge,
    }

    def __init__(self, rule: str, scaling_factor: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.merge, self.scaling_factor = partial(self.rules[rule], **options), scaling_factor

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Merge the pool's models."""
        return merged(modelpool, self.merge, self.scaling_factor)


class Calibrated(BaseAlgorithm):
    """SVC (`benchmarks.common.peers.svc`) of what another method merges; all but matrices stay.

    FusionBench has it, too, but hands the merged model to its pool, where that of DINOv2 takes
    only paths.

    Args:
        base_method: the other method, as FusionBench's configs have it.
        alpha: the least share, `a` in `svc`; 1 / T if not given.
    """

    def __init__(self, base_method: Mapping[str, Any], alpha: float | None = None) -> None:
        super().__init__()
        self.base_method, self.alpha = instantiate(base_method), alpha

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Merge the pool's models."""
        before = self.base_method.run(modelpool).state_dict()

        def calibrate(name: str, base: Tensor, vectors: Sequence[Tensor]) -> Tensor:
            merged = before[name] - base
            return svc(merged, vectors, self.alpha) if base.dim() == 2 else merged

        return added(modelpool, calibrate)


class MatrixDOGE(DOGE_TA_Algorithm):
    """FusionBench's DOGE (arXiv 2501.01230) on matrices only, and faster (`learned_delta`).

    FusionBench merges what is a weight of the encoder and no norm, and knows norms by the name that
    CLIP gives them; it fails at DINOv2's.
    """

    def compute_task_vectors(self, modelpool: BaseModelPool, pretrained_model: nn.Module) -> Any:
        """Task vectors by model, without those of norms."""
        found = super().compute_task_vectors(modelpool, pretrained_model)
        return [
            {name: vector for name, vector in one.items() if vector.dim() == 2} for one in found
        ]

    def optimize_delta(self, task_vectors: Sequence[Mapping[str, Tensor]]) -> None:
        """Learn, for each matrix, what is added to all its task vectors."""
        self.delta = {}
        for name, projection in self.projection.items():
            rows = torch.stack([one[name] for one in task_vectors], dim=1)  # (m, T, n)
            scales = torch.stack([one[name] for one in self.lamdas])
            self.delta[name] = learned_delta(rows, scales, partial(torch.matmul, projection))
