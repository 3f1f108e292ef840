"""Whether merged models notice the fast solver: the comparison and its verdict."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from benchmarks.solvers import fast_accuracy


def test_differences_are_points_of_fast_over_exact() -> None:
    compared = fast_accuracy.comparison(
        {"exact": {"a": 0.5, "b": 0.7}, "fast": {"a": 0.52, "b": 0.69}}
    )
    assert compared["exact"] == pytest.approx({"a": 50, "b": 70, "mean": 60})
    assert compared["difference"] == pytest.approx({"a": 2, "b": -1, "mean": 0.5})


@pytest.mark.parametrize(("gain", "met"), [(0.002, True), (0.004, False), (-0.004, False)])
def test_means_that_differ_too_much_fail(
    gain: float, met: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merged = []

    def merge(candidate: object, tuned: list, base: Path, *, fresh: bool) -> SimpleNamespace:
        merged.append(candidate)
        return SimpleNamespace(folder=candidate.parameters["svd"])  # type: ignore[attr-defined]

    def evaluator(folder: str, split: str) -> dict[str, float]:
        assert split == "test"
        return {"a": 0.5, "b": 0.6 + (2 * gain if folder == "fast" else 0)}

    monkeypatch.setattr(fast_accuracy, "find_demo_models", lambda: [Path("base"), Path("a")])
    monkeypatch.setattr(fast_accuracy, "merge", merge)
    weights = {"differ": 3, "largest": 2e-6}
    monkeypatch.setattr(fast_accuracy, "weight_difference", lambda exact, fast: weights)
    made = evaluator, {"a": "Task A", "b": "Task B"}
    monkeypatch.setattr(fast_accuracy, "_demo_evaluator", lambda *_: made)
    outcome = CliRunner().invoke(fast_accuracy.main, ["--out", str(tmp_path)])
    assert outcome.exit_code == (0 if met else 1), outcome.output

    assert [candidate.parameters["svd"] for candidate in merged] == ["exact", "fast"] * 2
    assert len({candidate.parameters["rank_ratio"] for candidate in merged}) == 2
    saved = json.loads((tmp_path / "fast_accuracy.json").read_text())
    assert saved["agree"] == met
    text = (tmp_path / "fast_accuracy.md").read_text()
    assert text.count("| difference | +0.00 |") == 2
    assert "3 tensors by up to 2e-06" in text
    assert f"points apart: {'met' if met else 'missed'}" in text


def test_merged_weights_are_compared(tmp_path: Path) -> None:
    state = {"a": torch.ones(2, 2), "b": torch.ones(3)}
    for name, scale in (("exact", 1.0), ("fast", 1.5)):
        (tmp_path / name).mkdir()
        save_file(state | {"a": scale * state["a"]}, tmp_path / name / "model.safetensors")
    exact, fast = tmp_path / "exact", tmp_path / "fast"
    assert fast_accuracy.weight_difference(exact, fast) == {"differ": 1, "largest": 0.5}
    assert fast_accuracy.weight_difference(exact, exact) == {"differ": 0, "largest": 0.0}


def test_without_the_demos_models_it_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_accuracy, "find_demo_models", lambda: None)
    outcome = CliRunner().invoke(fast_accuracy.main, [])
    assert outcome.exit_code == 1
    assert "run `make demo` first" in outcome.output
