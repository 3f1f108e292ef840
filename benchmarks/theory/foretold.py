"""What the records of `predict` come to: how well measures foretell accuracy, as a table."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks.auto.number import AUTO, FINE_TUNED
from benchmarks.common.measure import RESULTS
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table
from benchmarks.theory.inputs import EXAMPLES
from cart_plugin.inspect.advice import least_loss
from cart_plugin.inspect.merges import AUTO_WITH_BASE, AVERAGE
from cart_plugin.merging.informed import MOST_INFORMED

TARGET = "bench-theory"
SUITES = {"vision": "images", "text": "texts", "llm": "language model"}
LABELS = {
    "kept": "kept, no data",
    "lost": "lost, no data",
    "kept on inputs": f"kept, on {EXAMPLES} inputs a task",
    "lost on inputs": "lost (the interference L), on the same",
}
PAPERS = frozenset({"ASWUDI", "SWUDI", "ACE", "DC-Merge", "aswudi", "swudi", "ace", "dc-merge"})
"""Methods that are known from papers alone: neither mergekit nor FusionBench has them."""
HELD_OUT = ("subsets", "vision-2", "llm-one 2", "llm-own 2")
"""Groups of which nothing was seen while the rule was made, by how they are called."""
_AVERAGES = ("average", "linear")
_MEAN_OF_TWO = 5  # revision of `merging` from which on four models are merged by two forms

Point = dict[str, Any]


def points(out: Path) -> Iterator[Point]:
    """What is known of each merge: its accuracy, the shares of each model's own, and measures."""
    for path in sorted((out / "predict").glob("*.json")):
        record = json.loads(path.read_text())
        if path.stem.startswith("llm"):
            yield from _of_language(path.stem, record["cases"])
        else:
            yield from _of_encoders(path.stem, record["cases"], out)


def _of_encoders(stem: str, cases: Mapping[str, Any], out: Path) -> Iterator[Point]:
    own = stem.removeprefix("subsets-")
    folder = RESULTS / "auto" / "number" if own == stem else out / "subsets"
    told = json.loads((folder / f"{own}.json").read_text())
    accuracies, examples = told["cases"], told["conditions"]["examples"]
    revision = told["conditions"]["revisions"]["merging"]
    for key, case in cases.items():
        count, place = key.split()
        for method, judged in accuracies.items():
            if method == FINE_TUNED:
                continue
            if method == AUTO and count == str(MOST_INFORMED) and revision < _MEAN_OF_TWO:
                continue
            found, alone = judged[count][int(place)], accuracies[FINE_TUNED][count][int(place)]
            group, suite = f"{stem} {key}", own.split("-")[0]
            yield _point(suite, group, case, method, found, alone, examples)


def _of_language(stem: str, cases: Mapping[str, Any]) -> Iterator[Point]:
    from benchmarks.theory.language import method_of

    folder = RESULTS / "llm" / ("own_starts" if stem == "llm-own" else "")
    told = json.loads((folder / "results.json").read_text())
    tasks, examples = list(told["tasks"]), told["examples"]["test"]
    for seed, case in cases.items():
        rows = told["test"][seed]
        models = [row["accuracy"] for row in rows if row["kind"] == "model"]
        alone = {task: one[task] for task, one in zip(tasks, models, strict=True)}
        for row in rows:
            if row["kind"] in ("merged", "other"):
                found = row["accuracy"]
                yield _point("llm", f"{stem} {seed}", case, method_of(row), found, alone, examples)


def _point(
    suite: str,
    group: str,
    case: Mapping[str, Any],
    method: str,
    accuracy: Mapping[str, float],
    alone: Mapping[str, float],
    examples: int,
) -> Point:
    values = list(accuracy.values())
    variance = sum(one * (1 - one) / examples for one in values) / len(values) ** 2
    shares = [accuracy[task] / alone[task] for task in accuracy]
    return {
        "suite": suite,
        "group": group,
        "layers": case.get("layers"),
        "method": method,
        "accuracy": statistics.fmean(values),
        "variance": variance,
        "share": statistics.fmean(shares),
        "shares": shares,
        **case["methods"].get(method, {}),  # no measures of merges that were judged alone
    }


def results(out: Path) -> dict[str, Any]:
    """By suite and kind: rank correlations, pairs of methods; and what the recommendation costs."""
    known = list(points(out))
    found = {}
    for suite in SUITES:
        own = [point for point in known if point["suite"] == suite and "lost" in point]
        if own:
            groups = _grouped(own)
            found[suite] = {
                "groups": len(groups),
                "merges": len(own),
                "kinds": {kind: _judged(kind, own, groups) for kind in LABELS if kind in own[0]},
                "layers": _layers(groups),
                "methods": _methods(known, suite),
                "held out": _told("lost", [it for it in groups if _is_held_out(it)]),
            }
    advice = [_advised(group) for group in _grouped(known)]
    measured = [
        one
        for path in sorted((out / "predict").glob("*.json"))
        for one in json.loads(path.read_text())["measured"]
    ]
    return {"suites": found, "advice": advice, "measured": measured}


def _methods(known: Sequence[Point], suite: str) -> dict[str, list[str]]:
    """Those that are measured, in some sets at least, and those of which accuracies are known."""
    own = [point for point in known if point["suite"] == suite]
    every = dict.fromkeys(point["method"] for point in own)
    measured = {point["method"] for point in own if "lost" in point}
    return {
        "measured": [method for method in every if method in measured],
        "judged alone": [method for method in every if method not in measured],
    }


def _is_held_out(group: Sequence[Point]) -> bool:
    name: str = group[0]["group"]
    return name.startswith(HELD_OUT)


def _grouped(known: Sequence[Point]) -> list[list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in known:
        groups.setdefault(point["group"], []).append(point)
    return list(groups.values())


def value(point: Point, kind: str) -> float:
    """The measure, the higher the better: the mean over the models."""
    sign = 1 if kind.startswith("kept") else -1
    return sign * statistics.fmean(point[kind])


def _judged(kind: str, known: Sequence[Point], groups: Sequence[Sequence[Point]]) -> dict[str, Any]:
    sign = 1 if kind.startswith("kept") else -1
    every = spearmanr([value(point, kind) for point in known], [point["share"] for point in known])
    single = [
        (sign * measure, share)
        for point in known
        for measure, share in zip(point[kind], point["shares"], strict=True)
    ]
    within = [
        spearmanr([value(one, kind) for one in group], [one["share"] for one in group]).statistic
        for group in groups
        if len({one["share"] for one in group}) > 1
    ]
    of_tools = [[one for one in group if one["method"] not in PAPERS] for group in groups]
    return {
        "all merges": float(every.statistic),
        "all models": float(spearmanr(*zip(*single, strict=True)).statistic),
        "methods": statistics.fmean(within) if within else float("nan"),
        "pairs": _told(kind, groups),
        "tools": _told(kind, of_tools),
    }


def _told(kind: str, groups: Sequence[Sequence[Point]]) -> tuple[int, int]:
    """How many pairs of methods of one set are told right, and how many there are."""
    right = pairs = 0
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            error = (one["variance"] + other["variance"]) ** 0.5
            if abs(one["accuracy"] - other["accuracy"]) > 2 * error:
                pairs += 1
                ahead = one["accuracy"] > other["accuracy"]
                right += (value(one, kind) > value(other, kind)) == ahead
    return right, pairs


def _layers(groups: Sequence[Sequence[Point]]) -> dict[str, float]:
    """How well what is told without data orders layers and models, by the inputs; mean of sets."""
    held = [group[0]["layers"] for group in groups if group[0]["layers"]]
    return {what: statistics.fmean(one[what] for one in held) for what in (held[0] if held else ())}


def _advised(group: Sequence[Point]) -> dict[str, Any]:
    """What is lost by the method that `mergekit-cart inspect` recommends, in points of accuracy."""
    by_method = {point["method"]: point for point in group}
    average = next(by_method[name] for name in _AVERAGES if name in by_method)
    chosen = by_method[AUTO]
    lost = {AVERAGE: -value(average, "lost"), AUTO_WITH_BASE: -value(chosen, "lost")}
    advised = chosen if least_loss(lost) == AUTO_WITH_BASE else average

    def behind(among: Sequence[Point]) -> float:
        return 100 * (max(point["accuracy"] for point in among) - advised["accuracy"])

    return {
        "suite": group[0]["suite"],
        "group": group[0]["group"],
        "held out": _is_held_out(group),
        "method": advised["method"],
        "tools": behind([point for point in group if point["method"] not in PAPERS]),
        "all": behind(group),
        "best": max(group, key=lambda point: point["accuracy"])["method"],
        "error": 100 * (2 * advised["variance"]) ** 0.5,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table a suite, a row a measure; and one of the recommendation."""
    heading = [
        "measure",
        *("all merges", "all models of all merges", "methods of one set", "layers"),
        *("pairs of methods told right", "of the tools' methods"),
    ]
    parts = [
        "Spearman's rank correlation of measures of the weights with accuracy on the test split "
        "(as a share of each model's own), over merges whose accuracies are recorded: sets of two "
        "to eight models of `make bench-auto`, subsets of tasks drawn for this, and the four of "
        "`make bench-llm`, by data-free methods. Layers: of what is told without data with the "
        "same on the inputs, over weights and models of one merge. Pairs of methods: of one set "
        "of models, whose accuracies differ by more than two standard errors; the tools are "
        "mergekit, FusionBench and this plugin, and the others are known from papers alone. "
        f"{made_by(TARGET, result['measured'])}"
    ]
    for suite, held in result["suites"].items():
        rows = [_row(kind, found, held["layers"]) for kind, found in held["kinds"].items()]
        parts.append(f"**{SUITES[suite]}, {held['merges']} merges of {held['groups']} sets**")
        measured, alone = ("; ".join(held["methods"][key]) for key in ("measured", "judged alone"))
        parts.append(
            f"Measured, in some sets at least: {measured}."
            + (f" Judged alone, for the last table: {alone}." if alone else "")
        )
        parts.append(markdown_table(heading, rows, ["---", *["---:"] * (len(heading) - 1)]))
    parts.append(_over_all(result["suites"]))
    parts.append(_advice(result["advice"]))
    return "\n\n".join(parts) + "\n"


def _over_all(suites: Mapping[str, Any]) -> str:
    """The pairs of all suites, of what is known without data."""
    found = []
    for kind in ("kept", "lost"):
        sums = {
            among: [
                sum(held["kinds"][kind][among][place] for held in suites.values())
                for place in (0, 1)
            ]
            for among in ("pairs", "tools")
        }
        found.append(
            f"{kind} tells {_share(*sums['pairs'])}, of the tools' methods {_share(*sums['tools'])}"
        )
    held_out = [sum(held["held out"][place] for held in suites.values()) for place in (0, 1)]
    return (
        f"Over all suites, without data: {'; '.join(found)}. Of the sets held out (below), lost "
        f"tells {_share(*held_out)}."
    )


def _row(kind: str, found: Mapping[str, Any], layers: Mapping[str, float]) -> list[str]:
    return [
        LABELS[kind],
        *(f"{found[key]:.2f}" for key in ("all merges", "all models", "methods")),
        f"{layers[kind]:.2f}" if kind in layers else "",
        *(_share(*found[among]) for among in ("pairs", "tools")),
    ]


def _share(right: int, pairs: int) -> str:
    return f"{right} of {pairs}" + (f" ({right / pairs:.0%})" if pairs else "")


def _advice(advice: Sequence[Mapping[str, Any]]) -> str:
    """What the recommendation costs, for sets that its making looked at and for others."""
    rows = []
    for suite, title in SUITES.items():
        for held_out in (False, True):
            own = [one for one in advice if one["suite"] == suite and one["held out"] is held_out]
            if own:
                rows.append(
                    [
                        f"{title}, {'held out' if held_out else 'seen before'}",
                        str(len(own)),
                        *(
                            f"{function(one[among] for one in own):.1f}"
                            for among in ("tools", "all")
                            for function in (statistics.fmean, max)
                        ),
                        str(sum(one["tools"] > 2 for one in own)),
                        f"{statistics.fmean(one['error'] for one in own):.1f}",
                    ]
                )
    heading = [
        *("sets", "number", "behind the best of the tools' methods", "at worst"),
        *("of all methods", "at worst", "more than 2 behind the tools'", "standard error"),
    ]
    words = (
        "What `mergekit-cart inspect` recommends, in points of accuracy behind the best method of "
        "the same set, which is known afterwards only (and partly best by chance: the last column "
        "is the standard error of one difference, of its independent examples). Held out: sets of "
        "models of which nothing was looked at while `cart_auto` and the rule were made."
    )
    return f"{words}\n\n" + markdown_table(heading, rows, ["---", *["---:"] * 7])
