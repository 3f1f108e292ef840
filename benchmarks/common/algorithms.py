"""What suites add to FusionBench's algorithms: a faster WUDI, and merges weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from torch import Tensor, nn


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

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Merge the pool's models."""

        def merge(vectors: Sequence[Tensor]) -> Tensor:
            return wudi(torch.stack(list(vectors)), self.iter_num)

        return merged(modelpool, merge, excluded=self.exclude_keys or ())


def merged(
    modelpool: BaseModelPool,
    merge: Callable[[Sequence[Tensor]], Tensor],
    scale: float = 1.0,
    excluded: Sequence[str] = (),
) -> nn.Module:
    """The pretrained model plus merged task vectors: by `merge` for matrices, else their mean."""

    def delta(name: str, base: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        matrix = base.dim() == 2 and name not in excluded
        return scale * (merge(vectors) if matrix else torch.stack(list(vectors)).mean(dim=0))

    return added(modelpool, delta)


@torch.no_grad()
def added(
    modelpool: BaseModelPool, delta: Callable[[str, Tensor, Sequence[Tensor]], Tensor]
) -> nn.Module:
    """The pretrained model plus, for each tensor, `delta` of its name, itself and task vectors."""
    pretrained = modelpool.load_pretrained_model()
    tuned = [model.state_dict() for model in modelpool.models()]
    merged = {
        name: tensor + delta(name, tensor, [state[name] - tensor for state in tuned])
        for name, tensor in pretrained.state_dict().items()
    }
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
