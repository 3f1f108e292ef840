"""Results of a suite that goes through `compare`: one file, and the table and plot made from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.common.cache import write_json
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table


def write_results(
    results: Mapping[str, Any], caption: str, target: str, out: Path, *, adds: bool = False
) -> None:
    """Write `results.json`, `table.md` and `methods.png` into a folder.

    Args:
        results: of `Suite.results`.
        caption: of the table.
        target: of make, that made them.
        out: the folder.
        adds: rows of other methods, which are there, stay.

    Raises:
        click.ClickException: they are of other tasks, data or models.
    """
    path = out / "results.json"
    older = json.loads(path.read_text()) if path.exists() else {"test": {}, "measured": []}
    if adds and older["test"]:
        results = added(results, older)
    measured = sittings(results, older)
    write_json(path, {**results, "caption": caption, "target": target, "measured": measured})
    write_report(out)


def added(results: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """Results with the rows of an older run's other methods, and of its other seeds.

    Rows at settings that a method has not chosen now are left out.

    Raises:
        click.ClickException: the older ones are of other tasks, data or models.
    """
    for name in ("tasks", "data", "fine_tuning", "examples"):
        if json.loads(json.dumps(results.get(name))) != older.get(name):
            raise click.ClickException(f"these results differ in {name} from those that are there")
    chosen = {**older["chosen"], **results["chosen"]}
    tests = {str(seed): rows for seed, rows in results["test"].items()}
    seeds = sorted({*older["test"], *tests}, key=int)
    test = {}
    for seed in seeds:
        now = {_key(row) for row in tests.get(seed, [])}
        kept = [
            row
            for row in older["test"].get(seed, [])
            if _key(row) not in now and older["chosen"].get(_key(row)) == chosen.get(_key(row))
        ]
        test[seed] = [*kept, *tests.get(seed, [])]
    found: dict[str, Any] = {
        name: {**older.get(name, {}), **results[name]}
        for name in ("grids", "grids_beside")
        if name in results
    }
    for name in ("validation", "validation_beside"):
        if name in results:
            methods = {row["method"] for row in results[name]}
            earlier = [row for row in older.get(name, []) if row["method"] not in methods]
            found[name] = [*earlier, *results[name]]
    return {
        **older,
        **{name: value for name, value in results.items() if value},
        **found,
        "chosen": chosen,
        "seeds": [int(seed) for seed in seeds],
        "test": test,
    }


def _key(row: Mapping[str, Any]) -> str:
    """What the table calls a row of the test split."""
    if row["kind"] == "other":
        return _method_of(row["name"])
    return str(row["method"] or row["name"])


def sittings(results: Mapping[str, Any], older: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the rows of `test` come from: `compare` finds those again that an older run made.

    Returns:
        Provenances with `cases`, a seed and a name each, as a record has them.
    """
    now, before = _rows(results), _rows(older)
    again = {key for key, row in now.items() if before.get(key) == row}
    kept = [
        one | {"cases": [key for key in one["cases"] if key in again]} for one in older["measured"]
    ]
    new = [key for key in now if key not in again]
    return [one for one in (*kept, provenance() | {"cases": new}) if one["cases"]]


def _rows(results: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{seed} {row['name']}": row for seed, rows in results["test"].items() for row in rows}


def lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's rows, by mean: accuracy by task over the seeds, and the mean's standard error.

    The error is that between the seeds; with one seed it is that of the test examples.
    """
    names = list(results["tasks"])
    found: dict[str, list[dict[str, Any]]] = {}
    for rows in results["test"].values():
        individual: dict[str, dict[str, float]] = {"accuracy": {}, "stderr": {}}
        for row in rows:
            if row["kind"] == "base":
                found.setdefault("pretrained", []).append(row)
            elif row["kind"] == "model":
                own = next(name for name in names if row["name"].startswith(f"input-{name}-"))
                for values in individual:
                    individual[values][own] = row[values][own]
            elif not row["error"]:
                found.setdefault(_key(row), []).append(row)
        found.setdefault("fine-tuned", []).append(individual)
    all_seeds = len(results["test"])
    table = [
        {
            "name": key,
            "seeds": "" if len(seeds) == all_seeds else f" ({len(seeds)} of {all_seeds} seeds)",
            "accuracy": {
                name: statistics.fmean(seed["accuracy"][name] for seed in seeds) for name in names
            },
            "mean": statistics.fmean(_mean(seed, names) for seed in seeds),
            "stderr": _error(seeds, names),
            "chosen": results["chosen"].get(key, {}),
        }
        for key, seeds in found.items()
    ]
    return sorted(table, key=_by_mean)


def _method_of(name: str) -> str:
    """Of a row that was merged elsewhere: its folder is called by the method and a hash."""
    return name.removeprefix("also-").rpartition("-")[0]


def _by_mean(line: Mapping[str, Any]) -> float:
    return float(line["mean"])


def _mean(seed: Mapping[str, Any], names: Sequence[str]) -> float:
    return statistics.fmean(seed["accuracy"][name] for name in names)


def _error(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float:
    if len(seeds) > 1:
        return statistics.stdev([_mean(seed, names) for seed in seeds]) / len(seeds) ** 0.5
    return sum(seeds[0]["stderr"][name] ** 2 for name in names) ** 0.5 / len(names)


def write_report(out: Path) -> None:
    """Write `table.md` and `methods.png` from a folder's `results.json`."""
    results = json.loads((out / "results.json").read_text())
    table = lines(results)
    whole = next(line["mean"] for line in table if line["name"] == "fine-tuned")
    limits = ("pretrained", "fine-tuned")
    whole_rows = (line for line in table if line["name"] not in limits and not line["seeds"])
    best = max(whole_rows, key=_by_mean)
    rows = [
        [
            f"**{line['name']}**" if line is best else f"{line['name']}{line['seeds']}",
            *(f"{100 * value:.1f}" for value in line["accuracy"].values()),
            f"{100 * line['mean']:.1f} ± {100 * line['stderr']:.1f}",
            f"{100 * line['mean'] / whole:.0f} %",
            ", ".join(f"{name} {value:g}" for name, value in line["chosen"].items()),
        ]
        for line in table
    ]
    header = ["method", *results["tasks"].values(), "mean", "of fine-tuned", "chosen"]
    ruler = ["---", *["---:"] * (len(header) - 2), "---"]
    caption = f"{results['caption']} {made_by(results['target'], results['measured'])}"
    (out / "table.md").write_text(f"{caption}\n\n{markdown_table(header, rows, ruler)}\n")
    _plot(table, out / "methods.png")


def _plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Means with their standard errors, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.8 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    colours = dict.fromkeys(("cart", "cart_auto"), "#d1632b")
    colours |= dict.fromkeys(("pretrained", "fine-tuned"), "#b0b7c3")
    bars = axes.barh(
        [f"{line['name']}{line['seeds']}" for line in table],
        [100 * line["mean"] for line in table],
        xerr=[100 * line["stderr"] for line in table],
        error_kw={"lw": 1},
        color=[colours.get(line["name"], "#2f6fb0") for line in table],
    )
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=8)
    axes.margins(x=0.1)
    axes.set_xlabel("mean test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
