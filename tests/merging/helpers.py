"""Random models to merge."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support import random, with_spectrum

EXACT = "exact"


def versions(*shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Independent random tensors of one shape, one a model."""
    return [random(*shape, seed=seed, dtype=dtype) for seed in range(count)]


def with_spectra(values: Tensor, m: int, n: int, *, count: int = 4) -> list[Tensor]:
    """Matrices with the same singular values in different directions, one a model."""
    return [with_spectrum(values, m, n, seed=10 * seed) for seed in range(count)]


def state_dict(seed: int) -> dict[str, Tensor]:
    """A model of a few layers."""
    return {
        "embed_tokens.weight": random(20, 8, seed=seed),
        "fc.weight": random(16, 12, seed=seed + 100),
        "fc.bias": random(12, seed=seed + 200),
        "position_ids": torch.arange(20)[None],
    }
