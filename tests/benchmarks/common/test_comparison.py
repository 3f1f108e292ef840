"""What the suites that go through compare share: grids, choices, and the table from reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration

from benchmarks.common import comparison
from cart_plugin.compare.variants import parse_assignment, variants


def row(name: str, kind: str, method: str = "", error: str = "", **settings: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "method": method,
        "settings": settings,
        "error": error,
        "note": "",
        "merge_seconds": 1.0,
        "accuracy": {},
        "stderr": {"one": 0.03, "two": 0.04},
    }


def test_every_grid_is_one_that_compare_takes_and_has_at_most_eight_points() -> None:
    options = [line.removeprefix("--grid=") for line in comparison.grid_options(comparison.GRIDS)]
    grids = [parse_assignment(line, single=False) for line in options]
    recipe = {"base_model": "base", "models": [{"model": name} for name in "abcdefgh"]}
    made = variants(recipe, list(comparison.GRIDS), grids=grids)
    counts = {name: sum(one.method == name for one in made) for name in comparison.GRIDS}
    assert all(1 <= count <= 8 for count in counts.values()), counts
    assert not [one.error for one in made if one.error]


def test_the_recipe_is_one_for_mergekit(tmp_path: Path) -> None:
    encoders = {name: tmp_path / name for name in ("a", "b", "c")}
    made = comparison.write_recipe(encoders, tmp_path / "base", tmp_path / "work")
    config = MergeConfiguration.model_validate(yaml.safe_load(made.read_text()))
    assert [str(entry.model) for entry in config.models or ()] == [
        str(path) for path in encoders.values()
    ]
    assert str(config.base_model) == str(tmp_path / "base")


def test_the_best_point_of_each_method_is_chosen_and_failed_ones_are_left_out() -> None:
    rows = [
        row("cart-1", "merged", "cart", rank_ratio=0.08, **{"lambda": 1.0}) | {"mean": 0.5},
        row("cart-2", "merged", "cart", rank_ratio=0.16, **{"lambda": 2.0}) | {"mean": 0.7},
        row("linear", "merged", "linear", normalize=True) | {"mean": 0.4},
        row("ties-1", "merged", "ties", error="no") | {"mean": None},
    ]
    chosen = comparison.choose(
        rows, {"cart": comparison.GRIDS["cart"], "linear": {}, "ties": comparison.GRIDS["ties"]}
    )
    assert chosen == {"cart": {"rank_ratio": 0.16, "lambda": 2.0}, "linear": {}}


def test_the_table_is_made_from_the_results_alone(tmp_path: Path) -> None:
    def seed(shift: float) -> list[dict[str, Any]]:
        both = {"one": 0.5 + shift, "two": 0.6 + shift}
        return [
            row("input-model", "base") | {"accuracy": {"one": 0.2, "two": 0.3}},
            row("input-one-1234", "model") | {"accuracy": {"one": 0.9, "two": 0.1}},
            row("input-two-5678", "model") | {"accuracy": {"one": 0.2, "two": 0.8}},
            row("cart", "merged", "cart") | {"accuracy": both},
            row("ties", "merged", "ties", error="no") | {"accuracy": {}},
            row("also-tsv-m-0a1b2c", "other") | {"accuracy": {"one": 0.3, "two": 0.4}},
        ]

    results = {
        "tasks": {"one": "Task one", "two": "Task two"},
        "seeds": [0, 1],
        "chosen": {"cart": {"lambda": 2.0}},
        "test": {"0": seed(0.0), "1": seed(0.1)},
    }
    found = {line["name"]: line for line in comparison.lines(results)}
    assert list(found) == ["pretrained", "tsv-m", "cart", "fine-tuned"]
    assert abs(found["fine-tuned"]["mean"] - 0.85) < 1e-9
    assert abs(found["cart"]["mean"] - 0.6) < 1e-9
    assert abs(found["cart"]["stderr"] - 0.05) < 1e-9

    # One seed: the error is that of the test examples, sqrt(0.03² + 0.04²) / 2.
    one = {**results, "seeds": [0], "test": {"0": seed(0.0)}}
    assert (
        abs({line["name"]: line for line in comparison.lines(one)}["cart"]["stderr"] - 0.025) < 1e-9
    )

    plain = json.loads(json.dumps(results))
    comparison.write_results(plain, "Accuracy.", "bench-text", tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Accuracy. Made by `make bench-text` (cart-plugin ")
    assert ").\n\n| method |" in table
    assert (tmp_path / "methods.png").stat().st_size > 1000
    assert "| **cart** | 55.0 | 65.0 | 60.0 ± 5.0 | 71 % | lambda 2 |" in table


def test_rows_that_an_older_run_made_keep_their_commit() -> None:
    old, new = {"name": "cart", "mean": 0.5}, {"name": "ties", "mean": 0.4}
    first = {"cart_plugin": "0.0.1", "commit": "aaa", "date": "2026-01-01"}
    made = first | {"cases": ["0 cart", "0 linear"]}
    older = {"test": {"0": [old, {"name": "linear", "mean": 0.3}]}, "measured": [made]}
    again = {"name": "linear", "mean": 0.31}
    found = comparison.sittings({"test": {0: [old, new, again]}}, older)
    assert found[0] == first | {"cases": ["0 cart"]}
    assert found[1]["cases"] == ["0 ties", "0 linear"]
    assert found[1]["commit"] != "aaa"


def test_methods_are_dealt_to_processes_by_their_grid_points() -> None:
    hands = comparison._deal({"a": {"x": (1, 2, 3)}, "b": {}, "c": {"x": (1, 2)}}, 2)
    assert hands == [["a"], ["c", "b"]]
    assert comparison._deal({"a": {}}, 5) == [["a"]]
