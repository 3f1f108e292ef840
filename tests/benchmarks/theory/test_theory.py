"""What the benchmark makes of its records, and its curves against what they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.theory import curves, predict
from tests.support import power_law, with_spectrum


def write(folder: Path, kept: dict[str, list[float]], revision: int = 6) -> Path:
    """A record of three models by some methods, and their accuracies: 0.2, 0.4, ... of 0.8."""
    tasks = ("a 0", "b 0", "c 0")
    accuracy = {
        method: {"3": [dict.fromkeys(tasks, 0.2 * (place + 1))], "4": [dict.fromkeys(tasks, 0.4)]}
        for place, method in enumerate(kept)
    }
    accuracy["fine-tuned"] = {count: [dict.fromkeys(tasks, 0.8)] for count in ("3", "4")}
    number = {"cases": accuracy, "conditions": {"revisions": {"merging": revision}}}
    (folder / "number").mkdir(exist_ok=True)
    (folder / "number" / "vision-0.json").write_text(json.dumps(number))
    methods = {
        method: {"kept": shares, "lost": [1 - share for share in shares]}
        for method, shares in kept.items()
    }
    measured = [{"cart_plugin": "0", "commit": "c", "date": "d", "cases": []}]
    cases = {key: {"members": [], "methods": methods} for key in ("3 0", "4 0")}
    own = folder / "predict"
    own.mkdir(exist_ok=True)
    (own / "vision-0.json").write_text(json.dumps({"cases": cases, "measured": measured}))
    return own


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(predict, "NUMBER", tmp_path / "number")

    def results(kept: dict[str, list[float]], **options: Any) -> Any:
        return predict.results(write(tmp_path, kept, **options))

    return results


RIGHT = {"average": [0.1, 0.2, 0.3], "SWUDI": [0.4, 0.5, 0.6], "cart_auto": [0.7, 0.8, 0.9]}


def test_a_measure_that_orders_methods_as_accuracy_does_is_right(results: Any) -> None:
    found = results(RIGHT)["suites"]["vision"]["kinds"]
    for kind in ("kept", "lost"):
        assert (found[kind]["right"], found[kind]["pairs"]) == (3, 3)
    assert found["kept"]["methods of one set of models"] != found["kept"]["all models"]


def test_a_measure_that_orders_them_the_other_way_is_wrong(results: Any) -> None:
    turned = dict(zip(RIGHT, reversed(RIGHT.values()), strict=True))
    found = results(turned)["suites"]["vision"]["kinds"]["kept"]
    assert (found["right"], found["pairs"]) == (0, 3)


def test_what_the_recommendation_costs_is_counted_in_points(results: Any) -> None:
    regret = results({"cart_auto": [0.1] * 3, "SWUDI": [0.2] * 3})["suites"]["vision"]["regret"]
    assert regret["worst"] == pytest.approx(20)
    assert regret["mean"] == pytest.approx(10)  # of four models both are equal


def test_accuracies_of_another_formula_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "NUMBER", tmp_path / "number")
    for revision, count in ((4, 5), (6, 6)):
        folder = write(tmp_path, RIGHT, revision)
        assert len(list(predict.points("vision", folder))) == count


def test_the_table_has_a_row_a_measure(results: Any) -> None:
    text = predict.markdown(results(RIGHT))
    assert "| kept, no data |" in text
    assert "3 of 3 (100%)" in text
    assert "on 64 inputs" not in text


def test_curves_end_where_nothing_is_left_out_and_both_scales_meet() -> None:
    differences = [with_spectrum(power_law(20, 0.7), 20, 30, seed=10 * t)[None] for t in range(3)]
    found = curves._curves(differences)
    assert found["R"] == sorted(found["R"], reverse=True)
    assert found["R"][-1] == pytest.approx(0, abs=1e-5)
    assert found["whole"] == sorted(found["whole"])
    assert found["whole"][-1] == pytest.approx(found["I"][-1], abs=1e-5)
    assert 0 < found["I"][0] <= 1


def test_equal_models_have_the_whole_interference() -> None:
    one = with_spectrum(torch.ones(1), 1, 30)
    found = curves._curves([(torch.ones(20, 1) @ one)[None]] * 2)
    assert found["I"] == pytest.approx([1] * len(curves.SHARES), abs=1e-4)
