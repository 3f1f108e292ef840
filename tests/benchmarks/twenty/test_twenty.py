"""Twenty tasks: what the ranks stand for, resuming, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.suites import Encoders
from benchmarks.twenty import report, strength, suite
from cart_plugin import CartSettings, merge_state_dicts


@pytest.fixture
def judged() -> list[dict[str, torch.Tensor]]:
    """The tensors that were judged."""
    return []


@pytest.fixture
def held(
    tmp_path: Path, judged: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> Encoders:
    generator = torch.Generator().manual_seed(0)
    base, *tensors = [torch.randn(24, 40, generator=generator) for _ in range(21)]
    save_file({"a.weight": base, "norm": base[0].clone()}, tmp_path / "model.safetensors")
    tuned = {
        task: {"a.weight": base + tensor, "norm": tensor[0].clone()}
        for task, tensor in zip(suite.ORDER, tensors, strict=True)
    }

    def judge(tensors: dict[str, torch.Tensor], tasks: tuple[str, ...]) -> dict[str, float]:
        judged.append(dict(tensors))
        near = 1 / (1 + (tensors["a.weight"] - base).norm().item() / 100)
        return dict.fromkeys(tasks, near)

    found = Encoders(tuned, judge, pretrained=tmp_path)
    monkeypatch.setattr(suite, "load_encoders", lambda *args: found)
    return found


def test_the_order_is_the_suites_and_then_the_others() -> None:
    assert len(set(suite.ORDER)) == 20
    assert suite.ORDER[:8] == suite.SUITE
    assert suite.COUNTS[-1] == suite.TUNED_COUNTS[-1] == len(suite.ORDER)
    assert [suite.tuned_count(count) for count in (2, 8, 11, 14, 17)] == [8, 8, 14, 14, 20]


def test_ranks_around_the_average_are_carts_and_from_the_base_task_arithmetics(
    held: Encoders,
) -> None:
    tuned = [held.tuned[task] for task in suite.ORDER[:8]]
    base = held.base()
    average = suite.merge("average", tuned, base, 1.0)
    for share, sums in suite._by_share(tuned, average, average):
        ours = suite._added(average, average, sums, 2.0)
        cart = merge_state_dicts(tuned, CartSettings(rank_ratio=share, lambda_=2.0, svd="exact"))
        for name in base:
            torch.testing.assert_close(ours[name], cart[name], atol=1e-4, rtol=1e-4)
    *_, (share, sums) = suite._by_share(tuned, average, base)
    assert share == 1.0
    arithmetic = suite.merge(suite.ARITHMETIC, tuned, base, 0.3)
    ours = suite._added(average, base, sums, 0.3)
    torch.testing.assert_close(ours["a.weight"], arithmetic["a.weight"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["norm"], average["norm"])


def test_it_resumes_and_reports(
    held: Encoders,
    judged: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = (suite.FINE_TUNED, "average", suite.TUNED, "cart_auto", suite.ARITHMETIC, "TSV-M")
    monkeypatch.setattr(suite, "METHODS", methods)
    monkeypatch.setattr(report, "METHODS", methods)
    suite.ranks(0, tmp_path)
    assert len(judged) == 3 * 2 * len(suite.SHARES) * 5
    suite.ranks(0, tmp_path)
    assert len(judged) == 3 * 2 * len(suite.SHARES) * 5
    chosen = json.loads((tmp_path / "ranks-0.json").read_text())["cases"]
    judged.clear()
    suite.number(0, chosen, tmp_path)
    assert len(judged) == 20 + (len(methods) - 1) * len(suite.COUNTS)
    suite.number(0, chosen, tmp_path)
    assert len(judged) == 20 + (len(methods) - 1) * len(suite.COUNTS)

    cart, scale = suite.settings_of(chosen, 14)
    tuned = [held.tuned[task] for task in suite.ORDER[:14]]
    own = [method for method in methods if method != suite.FINE_TUNED]
    place = 20 + own.index(suite.TUNED) * len(suite.COUNTS) + suite.COUNTS.index(14)
    torch.testing.assert_close(judged[place], merge_state_dicts(tuned, cart))
    place = 20 + own.index(suite.ARITHMETIC) * len(suite.COUNTS) + suite.COUNTS.index(14)
    torch.testing.assert_close(
        judged[place], suite.merge(suite.ARITHMETIC, tuned, held.base(), scale)
    )

    text = report.write_report(tmp_path, (0, 1, 2))
    assert (tmp_path / "table.md").read_text() == text
    for name in ("ranks", "number", "radar"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:8] == [f"| {method}" for method in methods]


def test_other_settings_of_cart_void_nothing_but_what_they_decide(
    held: Encoders, judged: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    suite.ranks(0, tmp_path)
    chosen = json.loads((tmp_path / "ranks-0.json").read_text())["cases"]
    path = tmp_path / "number-0.json"
    suite.number(0, chosen, tmp_path)
    before = json.loads(path.read_text())["cases"]
    judged.clear()
    for share in suite.SHARES:  # another best rank
        key = suite.rank_key(8, suite.AVERAGE, share)
        chosen[key] = dict.fromkeys(chosen[key], float(share == 0.24))
    suite.number(0, chosen, tmp_path)
    assert len(judged) == 2 * len(suite.COUNTS)
    assert set(json.loads(path.read_text())["cases"]) == set(before)


def test_the_best_is_the_smallest_of_equal_ones() -> None:
    cases = {
        suite.rank_key(8, suite.AVERAGE, share): {
            "1": 0.5,
            "2": 0.5 + 0.1 * (share in (0.08, 0.12)),
        }
        for share in suite.SHARES
    }
    assert suite.best(cases, 8, suite.AVERAGE) == (0.08, 2.0, pytest.approx(0.6))


def test_the_strength_of_each_is_its_own(
    held: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strength, "load_encoders", lambda *args: held)
    monkeypatch.setattr(strength, "ORDER", ("mnist", "icon_sets"))
    strength.strengths(0, tmp_path)
    cases = json.loads((tmp_path / "strength-0.json").read_text())["cases"]
    assert {task: (case["images"], case["epochs"]) for task, case in cases.items()} == {
        "mnist": (1600, 2),
        "icon_sets": (3000, 3),
    }
    assert all(case["pretrained"] == 1.0 > case["individual"] for case in cases.values())
    text = strength.markdown(tmp_path / "strength-0.json")
    assert "| Icon sets | 10 | 3000 x 3 | 100.0 |" in text
