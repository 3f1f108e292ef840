"""Rank rules, and the ranks that meet a size with the least error."""

from __future__ import annotations

import itertools

import pytest
import torch

from cart_plugin import CartError, RankRule, truncated_svd
from cart_plugin.compress import ranks
from cart_plugin.compress.ranks import Matrices
from cart_plugin.linalg.spectra import spectrum


def spectra_of(tensors, tasks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            one.name: torch.rand(min(one.matrices[1:]), generator=generator)
            .double()
            .sort(descending=True)
            .values
            for one in tensors
        }
        for _ in range(tasks)
    ]


def lost(spectra, chosen):
    return sum(
        float(values[ranks_[name] :].sum())
        for found, ranks_ in zip(spectra, chosen, strict=True)
        for name, values in found.items()
    )


def test_a_spectrum_holds_the_squared_singular_values():
    x = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(x.double()).square().sum(0)
    torch.testing.assert_close(spectrum(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spectrum(x * 1e-25) * 1e50, wanted, rtol=1e-4, atol=1e-4)
    assert float(spectrum(torch.zeros(1, 3, 4)).sum()) == 0


def test_rules_give_the_ranks_of_the_solvers():
    one = Matrices("a", (1, 40, 25))
    x = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    spectra = {one.name: spectrum(x[None])}
    for rule in (RankRule(0.3), RankRule(rank=4), RankRule(rank=99), RankRule(energy=0.8)):
        expected = truncated_svd(x, rule, svd="exact").rank
        assert ranks.by_rule([one], rule, spectra) == {one.name: expected}


def test_no_rank_is_below_the_least():
    tensors = [Matrices("a", (1, 8, 8), least_rank=1), Matrices("b", (1, 4, 4))]
    assert ranks.by_rule(tensors, RankRule(rank=0), {}) == {"a": 1, "b": 0}
    spectra = spectra_of(tensors, 2)
    assert (
        ranks.by_size(tensors, spectra, {"a": 1, "b": 1}, lambda _: 9, 8) == [{"a": 1, "b": 0}] * 2
    )


def test_a_size_is_met_with_the_least_error_of_all_choices():
    tensors = [Matrices("a", (1, 3, 4)), Matrices("b", (1, 2, 9))]
    spectra = spectra_of(tensors, 2)

    def size(chosen):
        return sum(one.direction * c[one.name] for c in chosen for one in tensors)

    options = [
        [{"a": a, "b": b}, {"a": c, "b": d}]
        for a, b, c, d in itertools.product(range(4), range(3), range(4), range(3))
    ]
    for target in range(0, 90, 3):
        found = ranks.by_size(tensors, spectra, {"a": 1, "b": 1}, size, target)
        assert size(found) <= target
        # Nothing that is as small loses less.
        fitting = [lost(spectra, option) for option in options if size(option) <= size(found)]
        assert lost(spectra, found) == pytest.approx(min(fitting))


@pytest.mark.parametrize("target_size", [0, 1.5, -0.1, True, "20%", float("nan")])
def test_a_target_size_is_a_share(target_size):
    with pytest.raises(CartError, match="target_size must lie between 0 and 1"):
        ranks.checked_rule(None, None, None, target_size)
