"""The study behind CART without hyperparameters: the plugin's formulas, and whole tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.auto import carry, cost, search
from benchmarks.auto.report import AUTO, COLORS, markdown, write_report
from benchmarks.auto.variants import Variant, merge_factors
from benchmarks.suites import Encoders
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.least_interference import least_interference


def tasks(count: int, m: int, n: int) -> list[LowRank]:
    generator = torch.Generator().manual_seed(0)
    return [
        truncated_svd(torch.randn(m, n, generator=generator), RankRule(1.0)) for _ in range(count)
    ]


def cut(task: LowRank, ratio: float) -> LowRank:
    count = int(ratio * len(task.S))
    return LowRank(task.U[:, :count], task.S[:count], task.Vh[:count])


@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize(("m", "n"), [(24, 50), (50, 24)])
def test_the_default_variant_is_the_plugins_method(m: int, n: int, pull: float) -> None:
    full = tasks(5, m, n)
    expected = least_interference([(cut(task, 0.16), 1.0) for task in full], pull=pull)
    assert torch.allclose(merge_factors(full, Variant(pull=pull)), expected, atol=1e-4)


def test_the_encoders_centre_and_factors_lead_to_the_plugins_merge() -> None:
    generator = torch.Generator().manual_seed(1)
    tuned = {
        str(index): {
            "a.weight": torch.randn(20, 30, generator=generator),
            "norm.weight": torch.randn(20, generator=generator),
        }
        for index in range(4)
    }
    encoders = Encoders(tuned, lambda tensors, names: {})
    average = encoders.average()
    factors = encoders.factors(average)
    assert list(factors) == ["a.weight"]
    expected = merge_state_dicts(tuned, CartSettings(lambda_="auto"))
    found = average["a.weight"] + merge_factors(factors["a.weight"], Variant())
    assert torch.allclose(found, expected["a.weight"], atol=1e-4)
    assert torch.allclose(average["norm.weight"], expected["norm.weight"], atol=1e-6)


@pytest.mark.parametrize("group", search.VARIANTS)
def test_every_variant_gives_finite_weights_of_its_own(group: str) -> None:
    a, b, c, d = (task.dense() for task in tasks(4, 60, 80))
    deltas = [a, b, 0.1 * c - a, 0.1 * d - b]  # they all but cancel, so that every limit matters
    full = [truncated_svd(delta, RankRule(1.0)) for delta in deltas]
    variants = search.VARIANTS[group].values()
    # The smaller of two rules is one of them.
    merged = [merge_factors(full, variant) for variant in variants if variant.rank != "both"]
    assert all(torch.isfinite(one).all() and one.shape == (60, 80) for one in merged)
    for index, one in enumerate(merged):
        assert not any(torch.allclose(one, other) for other in merged[:index])


def test_variants_that_a_flat_spectrum_does_not_tell_apart_are_named_apart() -> None:
    keys = [search.key_of(v) for group in search.VARIANTS.values() for v in group.values()]
    # Only the defaults come up again and again: once in each group that varies one thing.
    assert {key for key in keys if keys.count(key) > 1} == {search.key_of(Variant())}


def test_the_search_resumes_and_its_table_has_all_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    tuned = {
        str(index): {"a.weight": torch.randn(8, 12, generator=torch.Generator().manual_seed(index))}
        for index in range(3)
    }

    def judge(tensors: object, names: object) -> dict[str, float]:
        judged.append("x")
        return {"one": 0.5, "two": 0.25}

    monkeypatch.setattr(search, "load_encoders", lambda *args: Encoders(tuned, judge))
    for suite in search.SUITES:
        for seed in search.SEEDS:
            search.search(suite, seed, tmp_path)
    different = {search.key_of(v) for group in search.VARIANTS.values() for v in group.values()}
    assert len(judged) == 4 * len(different)
    search.search("vision", 0, tmp_path)
    assert len(judged) == 4 * len(different)
    caption, _, *table = search.markdown(tmp_path).splitlines()
    assert "Made by `make bench-auto` (cart-plugin " in caption
    assert len(table) == 2 + sum(len(group) for group in search.VARIANTS.values())
    assert table[2].endswith("| 37.5 | 37.5 | 37.5 | 37.5 | 37.5 | 37.5 |")


def test_carrying_tunes_on_validation_alone_and_reports_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = carry.Setting("vision", 3, seeds=(0, 1))
    monkeypatch.setattr(carry, "SETTINGS", (setting,))
    monkeypatch.setattr(
        carry,
        "GRID",
        [CartSettings(rank_ratio=0.5, lambda_=1.0), CartSettings(rank_ratio=0.5, lambda_=9.0)],
    )
    calls: list[tuple[int, str]] = []

    def load(suite: str, seed: int, split: str, *rest: object) -> Encoders:
        calls.append((seed, split))
        tuned = {
            name: {"a.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed + i))}
            for i, name in enumerate(setting.tasks)
        }

        def judge(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, float]:
            size = float(tensors["a.weight"].norm()) / 100
            return dict.fromkeys(names, size if split == "validation" else 1 - size)

        return Encoders(tuned, judge)

    monkeypatch.setattr(carry, "load_encoders", load)
    carry.carry(setting, tmp_path)
    assert calls == [(0, "validation"), (0, "test"), (1, "test")]
    (row,) = carry.results(tmp_path)["settings"]
    # The larger lambda is the larger matrix: best on this validation, worst on this test split.
    assert row["tuned"] == "rank_ratio 0.5, lambda 9"
    assert all(len(values) == 2 for values in row["test"].values())
    assert max(row["test"]["CART, tuned here"]) < min(row["test"][AUTO])
    write_report(carry.results(tmp_path), tmp_path)
    assert (tmp_path / "carry.png").stat().st_size > 10_000
    assert set(row["test"]) == set(COLORS)
    assert "| vision, 3 tasks |" in markdown(carry.results(tmp_path))


@pytest.mark.slow
def test_the_cost_is_measured_on_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "cache"))
    arguments = ["--quick", "--runs", "1", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(cost.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    rows = (tmp_path / "cost.md").read_text().splitlines()[-6:]
    assert [row.split(" | ")[0] for row in rows] == ["| 3 Llama"] * 3 + ["| 4 Llama"] * 3
    assert [row.split(" | ")[1] for row in rows] == [*cost.TITLES.values()] * 2
    assert rows[0].endswith("| 1.00 | 1.00 | 1.00 |")
