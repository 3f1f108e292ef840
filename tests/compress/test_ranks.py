"""Ranks of adapters: what PEFT needs at least, and target sizes."""

from __future__ import annotations

import pytest
import torch

from cart_plugin import CartError, RankRule, truncated_svd
from cart_plugin.compress import adapters, compress
from cart_plugin.compress.layers import Layer
from cart_plugin.compress.peft_files import not_empty
from cart_plugin.compress.ranks import by_rule
from cart_plugin.linalg import svd
from tests.compress.models import save_tasks


def layer(name: str, m: int, n: int, bias: str | None = None) -> Layer:
    return Layer(f"{name}.weight", name, "linear", (m, n), bias, name)


def test_a_carried_bias_needs_a_rank():
    layers = [layer("a", 8, 8, "a.bias"), layer("b", 4, 4)]
    assert by_rule(layers, RankRule(rank=0), {}) == {"a.weight": 1, "b.weight": 0}


def test_an_adapter_is_never_empty():
    layers = [layer("a", 8, 8), layer("b", 4, 4)]
    none = {"a.weight": 0, "b.weight": 0}
    assert not_empty(layers, none) == {"a.weight": 0, "b.weight": 1}
    assert not_empty(layers, {**none, "a.weight": 2}) == {"a.weight": 2, "b.weight": 0}


def test_no_adapter_of_a_model_is_empty(tmp_path):
    report = compress(save_tasks(tmp_path, "llama"), tmp_path / "out", rank=0)
    ranks = [entry.ranks for entry in report.entries.values() if entry.kind == "lora"]
    assert [sum(column) for column in zip(*ranks, strict=True)] == [1, 1, 1]


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


def test_of_large_matrices_hardly_more_than_the_least_error_is_left(tmp_path, monkeypatch):
    """`auto` takes subspace iteration for them; smaller matrices stand in."""
    monkeypatch.setattr(adapters, "_LARGE", 64)
    monkeypatch.setattr(svd, "_FAST_SIDE", 64)
    models = save_tasks(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    errors = {
        svd: compress(models, tmp_path / svd, rank=4, svd=svd).squared_error
        for svd in ("auto", "subspace", "exact")
    }
    assert errors["auto"] == errors["subspace"]
    assert errors["exact"] < errors["auto"] < 1.01 * errors["exact"]
