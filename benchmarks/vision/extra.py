"""What the suite adds to FusionBench: missing methods, and a task pool that evaluates in bf16.

The methods are those that it lacks for image encoders, or has only in a form that takes hours.
Named by the suite's commands: `fusion_bench ... method._target_=benchmarks.vision.extra.X`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm
from fusion_bench.models.wrappers.switch import SwitchModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
        with _inputs_added(linear_modules_to_merge, sums, counts):
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
def _inputs_added(
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


class GramWUDI(BaseAlgorithm):
    """WUDI (arXiv 2503.08099) as FusionBench configures it, a hundred times faster.

    Its loss for a matrix M and task vectors D_t, sum_t ||(M - D_t) D_t^T||^2 / ||D_t||^2, is
    quadratic: with G_t = D_t^T D_t / ||D_t||^2 the gradient is 2 (M sum_t G_t - sum_t D_t G_t).
    The sums are made once, so a step of Adam is one product; FusionBench's steps make two for each
    task, and the larger one for tall matrices. The steps themselves (Adam, learning rate 1e-5, from
    the sum of the task vectors) are the same, and so is what is merged.

    Args:
        iter_num: steps.
        exclude_keys: names of matrices to average instead.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {
        "iter_num": "iter_num",
        "exclude_keys": "exclude_keys",
    }

    def __init__(self, iter_num: int, exclude_keys: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iter_num, self.exclude_keys = iter_num, exclude_keys

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Merge the pool's models."""
        pretrained = modelpool.load_pretrained_model()
        base = pretrained.state_dict()
        tuned = [model.state_dict() for model in modelpool.models()]
        excluded = set(self.exclude_keys or ())
        merged = {}
        for name, tensor in base.items():
            vectors = torch.stack([state[name] - tensor for state in tuned])
            matrix = tensor.dim() == 2 and name not in excluded
            delta = wudi(vectors, self.iter_num) if matrix else vectors.mean(dim=0)
            merged[name] = tensor + delta
        pretrained.load_state_dict(merged)
        return pretrained


def wudi(vectors: Tensor, steps: int, rate: float = 1e-5) -> Tensor:
    """The merged task vector of one matrix.

    Args:
        vectors: task vectors, (tasks, rows, columns).
        steps: of Adam.
        rate: its learning rate.

    Returns:
        (rows, columns).
    """
    norms = vectors.square().sum(dim=(1, 2)).clamp_min(1e-30)  # untrained: no task vector
    gram = torch.zeros(vectors.shape[2], vectors.shape[2])
    target = torch.zeros_like(vectors[0])
    for vector, norm in zip(vectors, norms, strict=True):
        own = vector.T @ vector / norm
        gram += own
        target += vector @ own
    merged = nn.Parameter(vectors.sum(dim=0))
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = 2 * (merged @ gram - target)
        optimizer.step()
    return merged.detach()
