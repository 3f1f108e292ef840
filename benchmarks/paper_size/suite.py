"""Merges of models of the paper's size: `python -m benchmarks.paper_size`.

Every merge is one `fusion_bench` command, a process of its own, measured from start to exit: the
same threads, models and start-up for all of them. A method that takes longer than its limit is
ended, and one that memory or disk does not suffice for is not started; both are recorded with the
reason. Models are made in the cache, a kind at a time, and removed when that kind is measured.

    python -m benchmarks.paper_size --models b32 --counts 8 --methods cart,tsvm --limit 600
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import out_option, progress, publish, report_option, resume_option
from benchmarks.common.measure import RESULTS, CommandError, TooLongError, measure
from benchmarks.common.record import Record, conditions
from benchmarks.paper_size import report
from benchmarks.paper_size.methods import METHODS, settings
from benchmarks.paper_size.models import (
    KINDS,
    TINY,
    Kind,
    bytes_of,
    folder_of,
    pool_config,
    remove_models,
    write_models,
)

COUNTS = (8, 14, 20)
PACKAGES = ("fusion-bench", "torch", "scipy", "transformers", "lightning", "hydra-core")
ROOMS = ("linalg", "merging")
OUT_OF_MEMORY = "out of memory"
_GB = 1e9


@dataclass(frozen=True)
class Case:
    """A merge to measure.

    Attributes:
        kind: key of the models' kind.
        count: of fine-tuned models.
        method: key of the method.
    """

    kind: str
    count: int
    method: str

    @property
    def key(self) -> str:
        """Its key in the results."""
        return f"{self.kind} | {self.count} | {self.method}"

    def overrides(self) -> list[str]:
        """The command line after `fusion_bench --config-dir CONF`."""
        return [
            *settings(self.method, self.kind, self.count),
            "modelpool=paper_size",
            "taskpool=dummy",
            "fabric.accelerator=cpu",
            "fabric.loggers=null",
            "report_save_path=null",
            "print_config=false",
        ]


def run_case(case: Case, kind: Kind, folder: Path, limit: float) -> dict[str, Any]:
    """Run a merge once; what it needed, or why there is nothing to say.

    Args:
        case: what to run.
        kind: of the models.
        folder: of the models.
        limit: seconds it may take.
    """
    told = {"command": " ".join(["fusion_bench", *case.overrides()])}
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".paper-size-") as name:
        work = Path(name)
        config = work / "conf" / "modelpool" / "paper_size.yaml"
        config.parent.mkdir(parents=True)
        config.write_text(yaml.safe_dump(pool_config(kind, folder, case.count), sort_keys=False))
        program = Path(sys.executable).with_name("fusion_bench")
        memory = _available_memory()
        started = time.monotonic()
        try:
            needed = measure(
                [program, "--config-dir", work / "conf", *case.overrides()],
                work / "log.txt",
                {**os.environ, "HF_HUB_OFFLINE": "1"},
                folder=work,
                limit=limit,
                memory=memory,
            )
        except TooLongError:
            return told | {"over": limit, "load_before": load}
        except CommandError as error:
            after = round(time.monotonic() - started, 1)
            reason = _reason(str(error))
            if reason == OUT_OF_MEMORY and memory is not None:
                reason = f"{reason}: wants more than {memory / _GB:.0f} GB"
            return told | {"error": reason, "after": after, "load_before": load}
    return told | {"runs": [asdict(needed) | {"load_before": load}]}


def _reason(message: str) -> str:
    """The line of a failed command's last words that says why."""
    words = ("exited with -9", "DefaultCPUAllocator", "MemoryError", "Cannot allocate memory")
    if any(word in message for word in words):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines)[-1]


def lacking(case: Case, kind: Kind) -> str | None:
    """Why a case cannot run on this machine, or None."""
    one = bytes_of(kind)
    # All of FusionBench's methods but averages, and ours, hold the models or their differences,
    # and besides them the base, the merged model and a task in the works.
    needed = (case.count + 3) * one
    memory = _available_memory()
    if METHODS[case.method].holds_all and memory is not None and needed > memory:
        return f"needs about {needed / _GB:.0f} GB of memory, {memory / _GB:.0f} are free"
    return None


def _lacks_disk(kind: Kind, count: int) -> str | None:
    folder = folder_of(kind)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    needed = (count + 1) * bytes_of(kind) - there
    free = shutil.disk_usage(folder).free - 1 * _GB
    if needed > free:
        return f"{count} models need {needed / _GB:.0f} GB of disk, {free / _GB:.0f} are free"
    return None


def _available_memory() -> int | None:
    """Bytes that a process can have, one GB left to others; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return max(0, 1024 * int(found[0]) - int(_GB)) if found else None


def due_cases(
    cases: Sequence[Case], record: Record, runs: int, limit: float
) -> list[tuple[int, Case]]:
    """What is left to run, round by round; what took too long only with a higher limit."""
    found = []
    for round_ in range(runs):
        for case in cases:
            known = record.cases.get(case.key, {})
            if known.get("over", 0.0) < limit and len(known.get("runs", [])) <= round_:
                found.append((round_, case))
    return found


def run_all(
    cases: Sequence[Case],
    kinds: dict[str, Kind],
    record: Record,
    runs: int,
    limit: float,
    bar: Progress,
) -> None:
    """Run what is missing, methods in turns, so that a change of the load meets all of them."""
    todo = due_cases(cases, record, runs, limit)
    if not todo:
        return
    name = todo[0][1].kind
    kind = kinds[name]
    count = max(case.count for _, case in todo)
    if reason := _lacks_disk(kind, count):
        for case in {case for _, case in todo if case.count == count}:
            _put(record, case, {"error": reason})
        smaller = [case for case in cases if case.count < count]
        run_all(smaller, kinds, record, runs, limit, bar)
        return
    making = bar.add_task(f"making {kind.title}", total=count + 1)
    folder = write_models(kind, count, lambda done: bar.update(making, completed=done))
    task = bar.add_task("merging", total=len(todo))
    for round_, case in todo:
        bar.advance(task)
        if len(record.cases.get(case.key, {}).get("runs", [])) < round_:
            continue  # it has failed in the round before
        bar.update(task, description=f"merging: {case.key}")
        reason = lacking(case, kind)
        found = {"error": reason} if reason else run_case(case, kind, folder, limit)
        _put(record, case, found)


def _put(record: Record, case: Case, found: dict[str, Any]) -> None:
    """Record a run, or why there is none; earlier runs stay."""
    earlier = record.cases.get(case.key, {}).get("runs", [])
    runs = [*earlier, *found.get("runs", [])]
    record.put(case.key, found | ({"runs": runs} if runs else {}), adds=bool(earlier))


def _chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


@click.command()
@click.option("--models", default=",".join(KINDS), show_default=True, help="Kinds of models.")
@click.option("--counts", default=",".join(map(str, COUNTS)), show_default=True, help="How many.")
@click.option("--methods", default=",".join(METHODS), help="Merge methods; all by default.")
@click.option("--runs", default=1, show_default=True, help="Of each case.")
@click.option("--limit", default=3600.0, show_default=True, help="Seconds that a merge may take.")
@click.option("--tiny", is_flag=True, help="Tiny models, results in the cache: no speed.")
@click.option("--keep-models", is_flag=True, help="Leave the models in the cache.")
@resume_option
@report_option
@out_option("paper_size")
def main(
    models: str,
    counts: str,
    methods: str,
    runs: int,
    limit: float,
    tiny: bool,
    keep_models: bool,
    resume: bool,
    only_report: bool,
    out: Path,
) -> None:
    """Measure merges of models of the paper's size by FusionBench's own commands."""
    console = Console()
    kinds = TINY if tiny else KINDS
    if tiny and out == RESULTS / "paper_size":
        out = cache_root() / "paper-size-tiny"
    if tiny and models == ",".join(KINDS):
        models = ",".join(TINY)
    chosen = _chosen(models, list(kinds), "--models")
    cases = [
        Case(kind, int(count), method)
        for kind in chosen
        for count in counts.split(",")
        for method in _chosen(methods, list(METHODS), "--methods")
    ]
    path = out / "results.json"
    if only_report:
        record = Record.written(path)
    else:
        record = Record(path, conditions(ROOMS, PACKAGES, tiny=tiny), resume)
        if record.discarded:
            console.print(f"Starting anew: {record.path} was {record.discarded}")
        with progress(console) as bar:
            for name in chosen:
                own = [case for case in cases if case.kind == name]
                run_all(own, kinds, record, runs, limit, bar)
                if not keep_models:
                    remove_models()
    publish(report.markdown(record, kinds), out / "table.md", console)
    publish(report.bars(record, kinds), out / "bars.md", console)
