"""Rank rules, and the ranks that meet a size with the least error."""

from __future__ import annotations

import itertools

import pytest
import torch

from cart_plugin import CartError, RankRule, truncated_svd
from cart_plugin.compress import ranks
from cart_plugin.compress.layers import Layer
from cart_plugin.indexing import compress
from tests.compress.models import save_tasks


def layer(name: str, m: int, n: int, bias: str | None = None) -> Layer:
    return Layer(f"{name}.weight", name, "linear", (m, n), bias, name)


def spectra_of(layers, tasks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            one.name: torch.rand(one.full_rank, generator=generator).double().sort().values.flip(0)
            for one in layers
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
    torch.testing.assert_close(ranks.spectrum(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks.spectrum(x * 1e-25) * 1e50, wanted, rtol=1e-4, atol=1e-4)
    assert float(ranks.spectrum(torch.zeros(1, 3, 4)).sum()) == 0


def test_rules_give_the_ranks_of_the_solvers():
    one = layer("a", 40, 25)
    x = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    spectra = {one.name: ranks.spectrum(x[None])}
    for rule in (RankRule(0.3), RankRule(rank=4), RankRule(rank=99), RankRule(energy=0.8)):
        expected = truncated_svd(x, rule, svd="exact").rank
        assert ranks.by_rule([one], rule, spectra) == {one.name: expected}


def test_a_carried_bias_needs_a_rank():
    layers = [layer("a", 8, 8, "a.bias"), layer("b", 4, 4)]
    assert ranks.by_rule(layers, RankRule(rank=0), {}) == {"a.weight": 1, "b.weight": 0}


def test_an_adapter_is_never_empty():
    layers = [layer("a", 8, 8), layer("b", 4, 4)]
    assert ranks.by_rule(layers, RankRule(rank=0), {}) == {"a.weight": 0, "b.weight": 1}


def test_a_size_is_met_with_the_least_error_of_all_choices():
    layers = [layer("a", 3, 4), layer("b", 2, 9)]
    spectra = spectra_of(layers, 2)

    def size(chosen):
        return sum(one.direction * c[one.name] for c in chosen for one in layers)

    options = [
        [{"a.weight": a, "b.weight": b}, {"a.weight": c, "b.weight": d}]
        for a, b, c, d in itertools.product(range(4), range(3), range(4), range(3))
    ]
    for target in range(18, 90, 3):
        found = ranks.by_size(layers, spectra, {"a.weight": 1, "b.weight": 1}, size, target)
        assert size(found) <= target
        # Nothing that is as small loses less.
        fitting = [lost(spectra, option) for option in options if size(option) <= size(found)]
        if all(any(chosen.values()) for chosen in found) and lost(spectra, found) > min(fitting):
            # Every adapter has one layer at least, whatever it is worth.
            assert min(sum(chosen.values()) for chosen in found) == 1


@pytest.mark.parametrize("share", [0.75, 0.85])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_target_size_is_met_within_a_per_cent(kind, share, tmp_path):
    models = save_tasks(tmp_path, kind, hidden_size=64, intermediate_size=256)
    report = compress(models, tmp_path / "out", target_size=share)
    assert share - 0.01 <= report.share <= share


def test_a_target_size_loses_less_than_one_ratio_of_the_same_size(tmp_path):
    models = save_tasks(tmp_path, "llama", hidden_size=64, intermediate_size=256)
    ratio = compress(models, tmp_path / "ratio", rank_ratio=0.25)
    chosen = compress(models, tmp_path / "chosen", target_size=ratio.share)
    assert chosen.bytes <= ratio.bytes
    assert chosen.squared_error < ratio.squared_error


def test_a_target_below_the_base_is_refused(tmp_path):
    models = save_tasks(tmp_path, "llama")
    with pytest.raises(CartError, match="the base and what is stored exactly take"):
        compress(models, tmp_path / "out", target_size=0.2)
    assert not (tmp_path / "out").exists()


def test_the_root_of_the_singular_values_on_both_sides_loses_least_in_bf16():
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(256, 16, generator=generator),
        torch.randn(16, 192, generator=generator),
    )
    x = left * 1e-3 * 0.6 ** torch.arange(16) @ right
    factors = truncated_svd(x, RankRule(rank=16), svd="exact")

    def error(power: float) -> float:
        a = (factors.S**power)[:, None] * factors.Vh
        b = factors.U * factors.S ** (1 - power)
        return float((b.bfloat16().float() @ a.bfloat16().float() - x).norm() / x.norm())

    even = error(0.5)
    assert even < 1.05 * min(error(0.0), error(1.0))
    one = layer("a", 256, 192)
    a, b = one.to_lora(truncated_svd(x[None], RankRule(rank=16), svd="exact"), torch.bfloat16)
    assert float((one.difference(a, b) - x).norm() / x.norm()) == pytest.approx(even, rel=0.05)
