"""What suites add to FusionBench's algorithms: a faster WUDI, and merges weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from torch import Tensor, nn

from benchmarks.common.data_free import wudi


class GramWUDI(BaseAlgorithm):
    """WUDI (arXiv 2503.08099) as FusionBench configures it, a hundred times faster.

    The steps themselves are the same, and so is what is merged (`benchmarks.common.data_free`).

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
        merge = partial(wudi, steps=self.iter_num)
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
