"""What the suites that go through compare share: grids and choices."""

from __future__ import annotations

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


def test_methods_are_dealt_to_processes_by_their_grid_points() -> None:
    hands = comparison._deal({"a": {"x": (1, 2, 3)}, "b": {}, "c": {"x": (1, 2)}}, 2)
    assert hands == [["a"], ["c", "b"]]
    assert comparison._deal({"a": {}}, 5) == [["a"]]
