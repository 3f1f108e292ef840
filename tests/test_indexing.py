"""One tensor of several models as a shared centre and a difference each."""

from __future__ import annotations

import pytest
import torch

from cart_plugin import CartError, CartSettings
from cart_plugin.indexing import index_tensors
from cart_plugin.lowrank import LowRank
from tests.support import best_approximation, random


@pytest.mark.parametrize("center", ["average", "base"])
def test_differences_are_truncated_around_the_centre(center: str) -> None:
    tensors, base = [random(12, 20, seed=seed) for seed in range(3)], random(12, 20, seed=9)
    settings = CartSettings(rank=4, center=center, svd="exact")  # type: ignore[arg-type]
    indexed = index_tensors(tensors, settings, base=base, name="mlp.weight")
    centre = base if center == "base" else torch.stack(tensors).mean(0)
    assert torch.allclose(indexed.centre, centre, atol=1e-6)
    for index, tensor in enumerate(tensors):
        assert isinstance(indexed.differences[index], LowRank)
        expected = centre + 0.5 * best_approximation(tensor - centre, 4)
        assert torch.allclose(indexed.restored(index, 0.5), expected.float(), atol=1e-4)
    assert indexed.stored == 12 * 20 + 3 * 4 * (12 + 20)


def test_what_is_not_decomposed_comes_back_as_it_was() -> None:
    tensors = [random(7, seed=seed) for seed in range(3)]
    indexed = index_tensors(tensors, name="norm.weight", weights=[1.0, 2.0, 0.5])
    for index, tensor in enumerate(tensors):
        assert torch.allclose(indexed.restored(index, 3.0), tensor, atol=1e-6)
    assert indexed.stored == 4 * 7


def test_the_base_has_to_be_there_and_to_fit() -> None:
    tensors = [random(6, 8, seed=seed) for seed in range(2)]
    settings = CartSettings(center="base")
    with pytest.raises(CartError, match="no base model"):
        index_tensors(tensors, settings)
    with pytest.raises(CartError, match="the base model"):
        index_tensors(tensors, settings, base=random(8, 6))
