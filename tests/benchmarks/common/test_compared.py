"""Results of a suite that goes through compare: the table, and rows that are added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.common import compared
from tests.benchmarks.common.test_comparison import row


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
    found = {line["name"]: line for line in compared.lines(results)}
    assert list(found) == ["pretrained", "tsv-m", "cart", "fine-tuned"]
    assert abs(found["fine-tuned"]["mean"] - 0.85) < 1e-9
    assert abs(found["cart"]["mean"] - 0.6) < 1e-9
    assert abs(found["cart"]["stderr"] - 0.05) < 1e-9

    # One seed: the error is that of the test examples, sqrt(0.03² + 0.04²) / 2.
    one = {**results, "seeds": [0], "test": {"0": seed(0.0)}}
    assert (
        abs({line["name"]: line for line in compared.lines(one)}["cart"]["stderr"] - 0.025) < 1e-9
    )

    plain = json.loads(json.dumps(results))
    compared.write_results(plain, "Accuracy.", "bench-text", tmp_path)
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
    found = compared.sittings({"test": {0: [old, new, again]}}, older)
    assert found[0] == first | {"cases": ["0 cart"]}
    assert found[1]["cases"] == ["0 ties", "0 linear"]
    assert found[1]["commit"] != "aaa"


def _results(**chosen: dict[str, float]) -> dict[str, Any]:
    return {"tasks": {"one": "One", "two": "Two"}, "fine_tuning": {"epochs": 2}, "chosen": chosen}


def _rows(**accuracies: float) -> list[dict[str, Any]]:
    return [
        row(f"also-{name}-12", "other") | {"accuracy": {"one": value, "two": value}}
        for name, value in accuracies.items()
    ]


def test_rows_of_other_methods_stay_where_rows_are_added(tmp_path: Path) -> None:
    inputs = [
        row(f"input-{name}-1", "model") | {"accuracy": {"one": 0.9, "two": 0.9}}
        for name in ("one", "two")
    ]
    first = _results(svc={"scale": 0.5}, ace={}) | {
        "test": {seed: [*inputs, *_rows(svc=0.5, ace=0.6, wudi=0.3)] for seed in (0, 1)},
        "seeds": [0, 1],
        "validation_beside": [{"method": "svc", "mean": 0.1}, {"method": "ace", "mean": 0.1}],
    }
    compared.write_results(first, "Accuracy.", "bench-text", tmp_path)
    now = _results(svc={"scale": 1.0}, swudi={}) | {
        "test": {0: [*inputs, *_rows(svc=0.7, swudi=0.8)]},
        "seeds": [0],
        "adapters": {},
        "validation_beside": [{"method": "svc", "mean": 0.2}],
    }
    compared.write_results(now, "Accuracy.", "bench-text", tmp_path, adds=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["seeds"] == [0, 1]
    assert found["chosen"] == {"svc": {"scale": 1.0}, "ace": {}, "swudi": {}}
    assert found["validation_beside"] == [
        {"method": "ace", "mean": 0.1},
        {"method": "svc", "mean": 0.2},
    ]
    means = {
        f"{line['name']}{line['seeds']}": round(line["mean"], 3) for line in compared.lines(found)
    }
    # Of the other seed, the row at a setting that is no longer chosen is gone.
    assert means == {
        "wudi": 0.3,
        "ace": 0.6,
        "svc (1 of 2 seeds)": 0.7,
        "swudi (1 of 2 seeds)": 0.8,
        "fine-tuned": 0.9,
    }
    table = (tmp_path / "table.md").read_text()
    assert "| **ace** |" in table  # the best of those with all seeds
    assert "| swudi (1 of 2 seeds) |" in table


@pytest.mark.parametrize("name", ["tasks", "fine_tuning"])
def test_rows_are_not_added_to_those_of_other_models(name: str, tmp_path: Path) -> None:
    first = _results() | {"test": {0: _rows(ace=0.5)}, "seeds": [0]}
    (tmp_path / "results.json").write_text(json.dumps({**first, "measured": []}))
    with pytest.raises(click.ClickException, match=f"differ in {name}"):
        compared.write_results({**first, name: {"other": 1}}, "", "bench-llm", tmp_path, adds=True)
