"""One tensor of several models as a shared centre and a difference each."""

from __future__ import annotations

import pytest
import torch

from cart_plugin import CartError, CartSettings
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.indexing import index_tensors, spectra_of
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


def test_ranks_of_each_model_take_the_place_of_the_rule() -> None:
    tensors = [random(12, 20, seed=seed) for seed in range(3)]
    settings = CartSettings(rank=7, svd="exact")
    indexed = index_tensors(tensors, settings, name="mlp.weight", ranks=[0, 3, 12])
    centre = torch.stack(tensors).mean(0)
    assert torch.equal(indexed.restored(0), indexed.centre)
    expected = centre + best_approximation(tensors[1] - centre, 3)
    assert torch.allclose(indexed.restored(1), expected.float(), atol=1e-4)
    assert torch.allclose(indexed.restored(2), tensors[2], atol=1e-4)
    assert indexed.stored == 12 * 20 + 3 * (12 + 20) + 12 * 20


def test_spectra_are_those_of_the_differences() -> None:
    tensors = [random(4, 6, 10, seed=seed) for seed in range(3)]
    centre = torch.stack(tensors).mean(0)
    for tensor, found in zip(tensors, spectra_of(tensors, name="experts.w"), strict=True):
        expected = torch.linalg.svdvals((tensor - centre).double()).square().sum(0)
        assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("function", [index_tensors, spectra_of])
def test_one_model_is_too_few(function) -> None:  # type: ignore[no-untyped-def]
    for tensors in ([], [random(6, 8)]):
        with pytest.raises(CartError, match="at least two fine-tuned models"):
            function(tensors)
