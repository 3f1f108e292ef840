"""The table of the merges of models of the paper's size, and whether its bar is met."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record
from benchmarks.common.tables import markdown_table
from benchmarks.paper_size.methods import BAR, METHODS, PEERS
from benchmarks.paper_size.models import Kind

TIME_BAR, MEMORY_BAR = 0.5, 1.0


def medians(case: Mapping[str, Any]) -> dict[str, float]:
    """Medians of a case's wall and CPU seconds, and of its peak in GB; empty if it has no run."""
    runs = case.get("runs")
    if not runs:
        return {}
    return {
        "wall": statistics.median(run["wall"] for run in runs),
        "cpu": statistics.median(run["cpu"] for run in runs),
        "peak": statistics.median(run["peak"] for run in runs) / 1e9,
    }


def why(case: Mapping[str, Any]) -> str:
    """Why a case has no figure, in a cell's words."""
    if "over" in case:
        return f"over {case['over']:g}"
    after = f"fails after {case['after']:.0f} s: " if "after" in case else ""
    return f"{after}{case['error']}".replace("|", "/")


def _at_least(case: Mapping[str, Any]) -> float:
    """Seconds that a case takes at least, where it was ended or has failed; 0 if not known."""
    return float(case.get("over") or case.get("after") or 0.0)


def markdown(record: Record, kinds: Mapping[str, Kind]) -> str:
    """A section a kind and number of models."""
    machine = record.conditions["machine"]
    head = (
        f"Whole `fusion_bench` processes, start-up and loading of the models included, on "
        f"{machine['processor']}, {machine['cores']} cores. Random models in fp32; their "
        "differences decay as those of the vision suite (CLIP) and of the text suite (RoBERTa). "
        f"{_times(record)}{made_by('bench-paper-size', record.measured)}"
    )
    sections = [f"### {title}\n\n{_table(cases)}" for title, cases in _sections(record, kinds)]
    return "\n\n".join([head, *sections]) + "\n"


def bars(record: Record, kinds: Mapping[str, Kind]) -> str:
    """What was aimed at, and whether it is met; see `markdown` for how it was measured."""
    lines = [[title, *line] for title, cases in _sections(record, kinds) for line in _bars(cases)]
    table = markdown_table(["models", "bar", "measured", "verdict"], lines)
    return f"{made_by('bench-paper-size', record.measured)}\n\n{table}\n"


def _times(record: Record) -> str:
    runs = [run for case in record.cases.values() for run in case.get("runs", [])]
    most = max((len(case.get("runs", [])) for case in record.cases.values()), default=0)
    busiest = max((run["load_before"] for run in runs), default=0.0)
    how = "One run each" if most < 2 else f"Medians of up to {most} runs"
    return (
        f"{how}; the load average before them, earlier merges included, was {busiest:g} at most. "
    )


def _groups(record: Record) -> list[tuple[str, int]]:
    found = {tuple(key.split(" | ")[:2]) for key in record.cases}
    return sorted((kind, int(count)) for kind, count in found)


def _sections(record: Record, kinds: Mapping[str, Kind]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, count in _groups(record):
        cases = {
            method: record.cases[f"{kind} | {count} | {method}"]
            for method in METHODS
            if f"{kind} | {count} | {method}" in record.cases
        }
        yield f"{kinds[kind].title if kind in kinds else kind}, {count} models", cases


def _table(cases: Mapping[str, Any]) -> str:
    tsvm = medians(cases.get("tsvm", {}))
    rows = []
    for method, case in cases.items():
        of = medians(case)
        title = f"**{METHODS[method].title}**" if METHODS[method].ours else METHODS[method].title
        if of:
            ratio = f"{of['wall'] / tsvm['wall']:.2f}" if tsvm else ""
            figures = [f"{of['wall']:.0f}", ratio, f"{of['cpu']:.0f}", f"{of['peak']:.1f}"]
        else:
            figures = [why(case), "", "", ""]
        rows.append([title, *figures])
    heading = ["method", "s", "of TSV-M's", "CPU s", "peak GB"]
    return markdown_table(heading, rows, ["---", *["---:"] * 4])


def _bars(cases: Mapping[str, Any]) -> list[list[str]]:
    """Each of our methods against each peer, where both have run."""
    lines = []
    for method in BAR:
        for peer in PEERS:
            ours, theirs = (medians(cases.get(name, {})) for name in (method, peer))
            name = METHODS[peer].title
            least = _at_least(cases.get(peer, {}))
            if ours and not theirs and least:
                text = f"{METHODS[method].title}: time at most {TIME_BAR:g} of {name}'s"
                ratio = ours["wall"] / least
                verdict = "met" if round(ratio, 2) <= TIME_BAR else "not known"
                lines.append([text, f"{ratio:.2f} of its time until it ended", verdict])
            if not ours or not theirs:
                continue
            for what, key, most in (("time", "wall", TIME_BAR), ("peak", "peak", MEMORY_BAR)):
                ratio = ours[key] / theirs[key]
                text = f"{METHODS[method].title}: {what} at most {most:g} of {name}'s"
                # As it is printed, so that a reader sees what was judged.
                met = round(ratio, 2) <= most
                lines.append([text, f"{ratio:.2f}", "met" if met else "missed"])
    return lines
