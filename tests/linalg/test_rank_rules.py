"""How many directions a rank rule keeps, and which rules are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cart_plugin import CartError, RankRule, truncated_svd
from cart_plugin.linalg.svd import SOLVERS
from tests.linalg.helpers import ACCURATE, EXACT_BAR, FAST_BAR
from tests.support import (
    SPECTRA,
    best_approximation,
    power_law,
    random,
    rank_deficient,
    relative_error,
    with_spectrum,
)


@pytest.mark.parametrize("svd", ACCURATE)
@pytest.mark.parametrize("shape", [(100, 130), (130, 100), (3, 40, 50)], ids=str)
@pytest.mark.parametrize("spectrum", ["power-0.5", "power-1", "power-2", "low-rank-plus-noise"])
@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 0.999])
def test_energy_keeps_as_many_directions_as_a_full_svd_says(
    svd: str, shape: tuple[int, ...], spectrum: str, energy: float
) -> None:
    *stack, m, n = shape
    values = SPECTRA[spectrum](min(m, n))
    x = torch.stack([with_spectrum(values, m, n, seed=seed) for seed in range((*stack, 1)[0])])
    x = x.reshape(shape)
    shares = torch.linalg.svdvals(x.double()).square().cumsum(-1)
    reached = shares / shares[..., -1:] >= energy
    expected = reached.int().argmax(-1) + 1
    factors = truncated_svd(x, RankRule(energy=energy), svd=svd)
    assert torch.equal((factors.S > 0).sum(-1), expected)
    assert factors.rank == int(expected.max())
    for index, k in enumerate(expected.reshape(-1).tolist()):
        matrix, found = x.reshape(-1, m, n)[index], factors.dense().reshape(-1, m, n)[index]
        assert relative_error(found, best_approximation(matrix, k)) <= FAST_BAR


def test_energy_of_one_keeps_the_matrix() -> None:
    for values in (power_law(40, 1), power_law(40, 2), rank_deficient(40)):
        x = with_spectrum(values, 40, 50)
        assert relative_error(truncated_svd(x, RankRule(energy=1.0)).dense(), x) <= EXACT_BAR


def test_energy_gives_each_matrix_of_a_stack_its_own_rank() -> None:
    x = torch.stack(
        [with_spectrum(rank_deficient(40, rank), 40, 50) for rank in (2, 9)] + [torch.zeros(40, 50)]
    )
    factors = truncated_svd(x, RankRule(energy=0.9999))
    assert (factors.S > 0).sum(-1).tolist() == [2, 9, 0]
    assert factors.rank == 9
    assert relative_error(factors.dense(), x) <= EXACT_BAR


@pytest.mark.parametrize("rule", [RankRule(rank=0), RankRule(rank_ratio=0.0)], ids=repr)
def test_rank_zero_keeps_nothing(rule: RankRule) -> None:
    factors = truncated_svd(random(5, 6), rule)
    assert rule.keeps_nothing
    assert factors.rank == 0
    assert torch.equal(factors.dense(), torch.zeros(5, 6))


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (RankRule(), (100, 300), 8),
        (RankRule(), (768, 768), 61),
        (RankRule(), (12, 300), 1),  # floor(0.96) would keep nothing
        (RankRule(rank_ratio=0.16), (100, 300), 16),
        (RankRule(rank_ratio=0.16), (300, 100), 16),
        (RankRule(rank_ratio=0.999), (100, 100), 99),
        (RankRule(rank_ratio=1.0), (100, 300), 100),
        (RankRule(rank_ratio=0.0), (100, 300), 0),
        (RankRule(rank_ratio=1e-9), (100, 300), 1),
        (RankRule(rank=7), (100, 300), 7),
        (RankRule(rank=7), (5, 300), 5),
        (RankRule(rank=7), (300, 5), 5),
        (RankRule(rank=0), (100, 300), 0),
        (RankRule(rank=7.0), (100, 300), 7),  # type: ignore[arg-type]
        (RankRule(energy=0.5), (100, 300), None),
        (RankRule(energy=0.0), (100, 300), 0),
    ],
    ids=repr,
)
def test_rank_that_a_rule_keeps(
    rule: RankRule, shape: tuple[int, int], expected: int | None
) -> None:
    assert rule.fixed_rank(*shape) == expected
    assert rule.keeps_nothing == (expected == 0)


def test_a_whole_float_is_a_rank() -> None:
    assert RankRule(rank=2.0).fixed_rank(5, 6) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": math.nan}, "rank_ratio must lie between 0 and 1, got nan"),
        ({"rank": -1}, "rank must be 0 or a positive whole number, got -1"),
        ({"rank": 2.5}, r"rank must be 0 or a positive whole number, got 2\.5"),
        ({"rank": math.nan}, "rank must be 0 or a positive whole number, got nan"),
        ({"rank": math.inf}, "rank must be 0 or a positive whole number, got inf"),
        ({"rank": True}, "rank must be a number, got True"),
        ({"rank_ratio": "8 %"}, "rank_ratio must be a number, got '8 %'"),
        ({"energy": -0.1}, r"energy must lie between 0 and 1, got -0\.1"),
        ({"energy": 1.5}, r"energy must lie between 0 and 1, got 1\.5"),
        ({"energy": math.nan}, "energy must lie between 0 and 1, got nan"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"rank_ratio": 0.1, "rank": 4}, r"rank_ratio=0\.1 and rank=4 are two rank rules"),
        ({"rank_ratio": 0.0, "energy": 1}, r"rank_ratio=0\.0 and energy=1 are two rank rules"),
        ({"rank": 4, "of_numerical_rank": True}, "of_numerical_rank needs a rank_ratio, got rank"),
    ],
    ids=repr,
)
def test_rank_rules_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        RankRule(**values)


OF_RANK = RankRule(0.08, of_numerical_rank=True)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(300, 400), (600, 520)], ids=str)
@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (7, 1), (8, 1), (16, 2), (24, 3)])
def test_a_low_numerical_rank_keeps_a_share_of_itself(
    svd: str, shape: tuple[int, int], rank: int, kept: int
) -> None:
    values = (torch.arange(min(shape)) < rank) * torch.linspace(2, 1.5, min(shape)).double()
    noise = 5e-3 * random(*shape, seed=5) / math.sqrt(max(shape))  # of full rank
    x = with_spectrum(values, *shape) + noise
    factors = truncated_svd(x, OF_RANK, svd=svd)
    assert factors.rank == kept
    bar = 5e-3 if svd == "subspace" else FAST_BAR
    assert relative_error(factors.S, torch.linalg.svdvals(x.double())[:kept]) <= bar
    scaled = truncated_svd(1e-20 * x, OF_RANK, svd=svd)  # squares that leave fp32
    assert relative_error(1e20 * scaled.S, factors.S) <= FAST_BAR


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_matrix_of_full_rank_keeps_the_bits_of_its_share(svd: str, exponent: float) -> None:
    for shape in ((200, 300), (600, 520)):
        x = with_spectrum(power_law(min(shape), exponent), *shape)
        found, plain = (truncated_svd(x, rule, svd=svd) for rule in (OF_RANK, RankRule(0.08)))
        assert all(torch.equal(getattr(found, part), getattr(plain, part)) for part in "US")
        assert torch.equal(found.Vh, plain.Vh)


def test_each_matrix_of_a_stack_has_its_own_numerical_rank() -> None:
    ranks = (16, 8, 200, 0)
    values = [(torch.arange(200) < rank).double() for rank in ranks]
    x = torch.stack([with_spectrum(one, 200, 240, seed=i) for i, one in enumerate(values)])
    factors = truncated_svd(x, OF_RANK)
    assert (factors.S > 0).sum(-1).tolist() == [2, 1, 16, 0]
    assert (factors.Vh.norm(dim=-1) > 0).sum(-1).tolist()[:3] == [2, 1, 16]
    alone = truncated_svd(x[2], RankRule(0.08))
    assert relative_error(factors.dense()[2], alone.dense()) <= EXACT_BAR
    low = truncated_svd(x[:2], OF_RANK)
    assert low.rank == 2


def test_the_plain_share_does_not_look_at_the_rank() -> None:
    x = with_spectrum((torch.arange(200) < 9).double(), 200, 240)
    assert truncated_svd(x, RankRule(0.08)).rank == 16
    assert truncated_svd(x, RankRule()).rank == 16


def test_a_share_is_of_the_matrix_that_stands_behind_fewer_coordinates() -> None:
    x = with_spectrum(power_law(20, 0.5), 20, 30)
    for shape, k in (((100, 400), 8), ((400, 100), 8), ((1000, 1000), 20)):
        assert truncated_svd(x, RankRule(0.08), of=shape).rank == k
    assert truncated_svd(x, RankRule(0.08)).rank == 1
    low = with_spectrum(rank_deficient(20, 8), 20, 30)
    rule = RankRule(0.08, of_numerical_rank=True)
    assert truncated_svd(low, rule, of=(1000, 1000)).rank == 1
