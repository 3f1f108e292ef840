"""Published ways to merge adapters, against what their papers say of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.adapters import formulas
from benchmarks.adapters.formulas import Factors
from benchmarks.common.data_free import factored, tsvm
from benchmarks.common.peers import elected, largest
from tests.support import random


def adapters(count: int = 3, rank: int = 2) -> list[Factors]:
    return [
        Factors(random(12, rank, seed=seed), random(rank, 16, seed=50 + seed))
        for seed in range(count)
    ]


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-5))


def test_core_space_loses_nothing() -> None:
    space = formulas.core_space(adapters())
    for one, core in zip(adapters(), space.cores, strict=True):
        assert torch.allclose(space.left @ core @ space.right, one.dense(), atol=1e-5)


def test_ways_in_core_space_are_those_of_whole_weights_on_its_cores() -> None:
    space = formulas.core_space(adapters())
    found = formulas.core_space_tsv(adapters())
    whole = space.left @ tsvm([factored(core) for core in space.cores]) @ space.right
    assert torch.allclose(found, whole, atol=1e-5)
    values = torch.linalg.svdvals(formulas.core_space_iso(adapters()))
    expected = torch.linalg.svdvals(sum(one.dense() for one in adapters()))[:6].mean()
    assert torch.allclose(values[:6], expected.expand(6), rtol=1e-4)
    assert values[6:].max() < 1e-4


def test_knots_is_ties_of_the_right_factors() -> None:
    taus = [one.dense() for one in adapters()]
    left, values, right = torch.linalg.svd(torch.cat(taus, dim=1).double(), full_matrices=False)
    parts = (values[:6, None] * right[:6]).chunk(3, dim=1)
    expected = left[:, :6] @ elected(largest(torch.stack(parts), 0.3))
    found = formulas.knots_ties(adapters(), density=0.3)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_with_all_entries_and_one_adapter_ties_gives_it_back() -> None:
    one = adapters(1)
    assert torch.allclose(formulas.knots_ties(one, density=1.0), one[0].dense(), atol=1e-5)
    found = formulas.compress_then_merge(one, rank=2, density=1.0)
    assert torch.allclose(found, one[0].dense(), atol=1e-5)
    assert torch.allclose(formulas.pico(one), one[0].dense(), atol=1e-5)


def test_subspaces_hold_more_of_all_than_those_of_their_mean() -> None:
    taus = torch.stack([one.dense() for one in adapters()])
    balanced = taus / taus.flatten(1).norm(dim=1)[:, None, None]

    def held(left: Tensor, right: Tensor) -> Tensor:
        return (left.mT @ balanced @ right.mT).square().sum()

    space = formulas.subspaces(adapters(), 3)
    u, _, vh = torch.linalg.svd(taus.mean(dim=0))
    assert held(space.left, space.right) > held(u[:, :3], vh[:3])
    for basis in (space.left, space.right.mT):
        assert torch.allclose(basis.mT @ basis, torch.eye(3), atol=1e-5)


def test_compress_then_merge_has_the_rank() -> None:
    assert rank_of(formulas.compress_then_merge(adapters(), rank=3, density=1.0)) == 3


def test_pico_scales_what_all_use_down() -> None:
    shared = random(12, 1, seed=9)
    same = [Factors(shared, random(1, 16, seed=seed)) for seed in range(3)]
    # One direction for all: each is scaled by 1 / T, and then to its former norm.
    assert torch.allclose(formulas.pico(same), sum(one.dense() for one in same) / 3, atol=1e-5)
    own = random(12, 1, seed=8)
    both = [Factors(torch.cat([shared, own], dim=1), random(2, 16, seed=7)), same[0]]
    found, plain = formulas.pico(both), sum(one.dense() for one in both) / 2
    direction = shared / shared.norm()
    assert (direction.mT @ found).norm() < (direction.mT @ plain).norm()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_nearest_of_a_rank(rank: int) -> None:
    matrix = random(12, 16)
    found = formulas.nearest(matrix, rank)
    assert rank_of(found) == rank
    rest = torch.linalg.svdvals(matrix)[rank:].norm()
    assert torch.allclose((matrix - found).norm(), rest, rtol=1e-4)
