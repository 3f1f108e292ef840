"""What the tables make of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.theory import cost, foretold, ranks
from benchmarks.theory.geometry import SHARES

TASKS = ("a 0", "b 0", "c 0")
RIGHT = {"average": [0.1, 0.2, 0.3], "SWUDI": [0.4, 0.5, 0.6], "cart_auto": [0.7, 0.8, 0.9]}
MEASURED = [{"cart_plugin": "0", "commit": "c", "date": "d", "cases": []}]


def write(
    out: Path,
    kept: dict[str, list[float]],
    *,
    judged: tuple[str, ...] = (),
    revision: int = 6,
    name: str = "vision-0",
) -> Path:
    """A record of two sets of models by some methods, and their accuracies: 0.2, 0.4, ... of 0.8.

    Args:
        out: the benchmark's results.
        kept: by method.
        judged: methods whose accuracies alone are known.
        revision: of the merges that were judged.
        name: of the record.
    """
    accuracy = {
        method: {"3": [dict.fromkeys(TASKS, 0.2 * (place + 1))], "4": [dict.fromkeys(TASKS, 0.4)]}
        for place, method in enumerate([*kept, *judged])
    }
    accuracy["fine-tuned"] = {count: [dict.fromkeys(TASKS, 0.8)] for count in ("3", "4")}
    conditions = {"revisions": {"merging": revision}, "examples": 150}
    place = out / "subsets" if name.startswith("subsets") else out / "auto" / "number"
    place.mkdir(exist_ok=True, parents=True)
    told = place / f"{name.removeprefix('subsets-')}.json"
    told.write_text(json.dumps({"cases": accuracy, "conditions": conditions}))
    methods = {
        method: {"kept": shares, "lost": [1 - share for share in shares]}
        for method, shares in kept.items()
    }
    cases = {key: {"members": [], "methods": methods} for key in ("3 0", "4 0")}
    (out / "predict").mkdir(exist_ok=True)
    record = {"cases": cases, "measured": MEASURED}
    (out / "predict" / f"{name}.json").write_text(json.dumps(record))
    return out


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(foretold, "RESULTS", tmp_path)

    def results(kept: dict[str, list[float]], **options: Any) -> Any:
        return foretold.results(write(tmp_path, kept, **options))

    return results


def test_a_measure_that_orders_methods_as_accuracy_does_is_right(results: Any) -> None:
    found = results(RIGHT)["suites"]["vision"]["kinds"]
    assert list(found) == ["kept", "lost"]  # nothing was measured on inputs
    for kind in found:
        assert found[kind]["pairs"] == (3, 3)
        assert found[kind]["tools"] == (1, 1)  # SWUDI is known from a paper alone
    assert found["kept"]["methods"] != found["kept"]["all models"]


def test_a_measure_that_orders_them_the_other_way_is_wrong(results: Any) -> None:
    turned = dict(zip(RIGHT, reversed(RIGHT.values()), strict=True))
    found = results(turned)["suites"]["vision"]["kinds"]["kept"]
    assert found["pairs"] == (0, 3)


def test_what_the_recommendation_costs_is_counted_in_points(results: Any) -> None:
    kept = {"average": [0.1] * 3, "cart_auto": [0.5] * 3, "TSV-M": [0.2] * 3, "SWUDI": [0.2] * 3}
    three, four = results(kept)["advice"]
    assert three["method"] == "cart_auto"
    assert three["tools"] == pytest.approx(20)  # TSV-M's
    assert three["all"] == pytest.approx(40)  # that of SWUDI, which no tool has
    assert three["best"] == "SWUDI"
    assert four["all"] == pytest.approx(0)  # all are equal there


def test_the_average_is_recommended_where_nothing_loses_less(results: Any) -> None:
    advice = results({"average": [0.5] * 3, "cart_auto": [0.51] * 3})["advice"]
    assert [one["method"] for one in advice] == ["average"] * 2
    assert advice[0]["tools"] == pytest.approx(20)


def test_methods_that_were_judged_alone_count_as_rivals_but_not_as_pairs(results: Any) -> None:
    found = results(RIGHT, judged=("TIES",))
    assert found["suites"]["vision"]["kinds"]["kept"]["pairs"] == (3, 3)
    assert found["suites"]["vision"]["merges"] == 6
    assert found["advice"][0]["best"] == "TIES"
    assert found["suites"]["vision"]["methods"]["judged alone"] == ["TIES"]
    assert "Judged alone, for the last table: TIES." in foretold.markdown(found)


def test_subsets_that_were_drawn_are_held_out(results: Any, tmp_path: Path) -> None:
    write(tmp_path, RIGHT, name="subsets-vision-2")
    advice = results(RIGHT)["advice"]
    assert [one["held out"] for one in advice] == [True, True, False, False]


def test_accuracies_of_another_formula_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretold, "RESULTS", tmp_path)
    for revision, count in ((4, 5), (6, 6)):
        assert len(list(foretold.points(write(tmp_path, RIGHT, revision=revision)))) == count


def test_the_tables_have_a_row_a_measure_and_a_row_for_the_recommendation(results: Any) -> None:
    text = foretold.markdown(results(RIGHT))
    assert "| kept, no data |" in text
    assert "3 of 3 (100%)" in text
    assert "lost tells 3 of 3 (100%), of the tools' methods 1 of 1 (100%)" in text
    assert "on 64 inputs" not in text
    assert "Measured, in some sets at least: " in text
    assert "Judged alone" not in text
    assert "| images, seen before | 2 | 0.0 | 0.0 |" in text


def test_the_rank_that_a_measure_names_is_beside_the_best_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = {(0.04, 1.0): 0.3, (0.08, 1.0): 0.5, (0.08, 2.0): 0.6, (0.16, 1.0): 0.4}
    monkeypatch.setattr(ranks, "accuracies", lambda: judged)
    told = {
        f"{ratio:g} {lambda_:g}": {"kept": [accuracy], "lost": [1 - accuracy]}
        for (ratio, lambda_), accuracy in judged.items()
    }
    record = {"cases": {"vision": told}, "measured": MEASURED}
    (tmp_path / "ranks.json").write_text(json.dumps(record))
    falling = [1 - share for share in SHARES]
    rising = [share / 10 for share in SHARES]
    curves = {"average": {"R": falling, "I": rising, "whole": falling}}
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves" / "vision.json").write_text(json.dumps({"cases": {"8": {"w": curves}}}))
    found = ranks.results(tmp_path)
    assert [(row["ratio"], row["best"], row["lambda"]) for row in found["rows"]] == [
        (0.04, 0.3, 1),
        (0.08, 0.6, 2),
        (0.16, 0.4, 1),
    ]
    assert found["over ranks"]["lost"] == pytest.approx(1)
    assert found["over ranks"]["R + I"] == pytest.approx(0.5)
    assert found["over settings"]["kept"] == pytest.approx(1)
    text = ranks.markdown(found)
    assert "The best rank is 8%" in text
    assert text.splitlines()[-3].endswith("| 16% | 4% | 16% | 16% | 8% | 8% |")


def test_what_inspecting_costs_is_compared_within_a_turn() -> None:
    def turn(merge: float, inspect: float) -> dict[str, Any]:
        return {
            f"{what}{suffix}": {"wall": wall, "cpu": wall, "peak": 1e9 * wall}
            for suffix in cost.BASES
            for what, wall in ((cost.MERGE, merge), (cost.INSPECT, inspect))
        }

    result = {
        "machine": {"cores": 2, "processor": "p", "load_average": 0.1},
        "shape": {"hidden": 1024, "layers": 8},
        "rounds": [turn(10, 20), turn(100, 150), turn(10, 18)],  # a busy one in between
        "measured": MEASURED,
    }
    assert cost.ratios(result)[""]["time"] == pytest.approx(1.8)
    text = cost.markdown(result)
    assert "medians of 3 turns" in text
    assert "| mergekit-cart inspect | 20.0 | 20.0 | 20000 | 1.80 | 1.80 |" in text
