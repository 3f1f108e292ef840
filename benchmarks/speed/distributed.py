"""Merges by several workers beside `mergekit-yaml` on the same cores: `make bench-distributed`.

Four models of the shape of Llama 3.2 1B in bf16. Wall time and memory are of a command with all of
its processes, from start to exit; the bytes of both sides are compared at the same number of
threads, by which products round. Beside them is what no program can do without
(`benchmarks.speed.floor`). What is measured stays, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
import yaml
from rich.console import Console

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.common.commands import publish, quick_option, resume_option, runs_option
from benchmarks.common.measure import RESULTS, LlamaShape, write_llama_models
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.speed.floor import RATIO, floor

TUNED = 4
LARGE = LlamaShape(2048, 8192, 16, 32, 128256, shared=4)  # Llama 3.2 1B
SMALL = LlamaShape(hidden=64, intermediate=160, layers=3, heads=4, vocabulary=512)
FLOOR = "floor"
PACKAGES = ("mergekit", "torch", "scipy", "ray", "transformers", "safetensors")
_EVERY = 0.1  # seconds between two looks at a command's memory


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        wall: seconds from start to exit.
        peak: the most bytes that its processes had to themselves at once: without pages of files,
            which the system can take back.
    """

    wall: float
    peak: int


@dataclass(frozen=True)
class Case:
    """A way to merge.

    Attributes:
        program: the command, without recipe and folder.
        options: behind recipe and folder.
        method: mergekit's name of it.
        is_for_bytes: whether it is run once, to be compared with, and not for its time.
    """

    program: Sequence[str]
    options: Sequence[str] = ()
    method: str = "cart"
    is_for_bytes: bool = False


def cases(workers: int, cores: int) -> dict[str, Case]:
    """The ways by name; each worker has its share of the cores."""
    here = Path(sys.executable)
    theirs = [str(here.with_name("mergekit-yaml"))]
    ours = [str(here), "-m", "cart_plugin", "merge"]
    share = str(max(1, cores // workers))
    return {
        "linear": Case(theirs, method="linear"),
        "mergekit-yaml": Case(theirs),
        "mergekit-yaml -j": Case(theirs, ["-j", share], is_for_bytes=True),
        "--workers 1": Case(ours, ["--workers", "1"]),
        f"--workers {workers}": Case(ours, ["--workers", str(workers), "-j", share]),
    }


@click.command()
@quick_option
@runs_option(3)
@click.option("--workers", default=2, show_default=True, help="Of the parallel merge.")
@resume_option
def main(quick: bool, runs: int, workers: int, resume: bool) -> None:
    """Merge in every way in turn; the exit code is 1 if bytes differ."""
    console, cores = Console(), os.cpu_count() or 1
    ways = cases(workers, cores)
    shape = SMALL if quick else LARGE
    out = cache_root() / "distributed-quick" if quick else RESULTS / "speed"
    sizes: dict[str, Any] = {"shape": asdict(shape), "models": TUNED, "workers": workers}
    record = Record(
        out / "distributed.json", conditions(MERGES, PACKAGES, quick=quick, **sizes), resume
    )
    if record.discarded:
        console.print(f"Starting anew: {out / 'distributed.json'} was {record.discarded}")
    models = _models(shape, "llama-tiny" if quick else "llama-1b", console)
    with tempfile.TemporaryDirectory(dir=models[0].parent) as scratch:
        for run in range(runs):
            for name, case in ways.items():
                known = record.cases.get(name, {"runs": []})["runs"]
                if len(known) > run or (run and case.is_for_bytes):
                    continue
                console.print(f"{name}, {run + 1} of {runs}", style="dim")
                cost, bytes_ = _run(case, models, Path(scratch))
                record.put(name, {"digest": bytes_, "runs": [*known, cost]}, adds=True)
        if FLOOR not in record.cases:
            console.print(FLOOR, style="dim")
            record.put(FLOOR, floor(models, Path(scratch)))
    text = markdown(record.conditions, record.measured, record.cases)
    publish(text, out / "distributed.md", console)
    if not all(equal(record.cases, workers).values()):
        sys.exit(1)


def _run(case: Case, models: Sequence[Path], scratch: Path) -> tuple[dict[str, Any], str]:
    """Merge: what it took, and a hash of what came of it."""
    out, recipe = scratch / "out", scratch / "recipe.yaml"
    settings = {"rank_ratio": RATIO} if case.method == "cart" else {"weight": 1.0}
    listed = [{"model": str(model)} for model in models]
    content = {"merge_method": case.method, "models": listed, "parameters": settings}
    recipe.write_text(yaml.safe_dump(content))
    load = round(os.getloadavg()[0], 1)
    command = [*case.program, str(recipe), str(out), *case.options, "--no-write-model-card"]
    cost = {**asdict(watch(command, scratch / "log")), "load_before": load}
    found = digest(out)
    shutil.rmtree(out)
    return cost, found


def equal(found: Mapping[str, Any], workers: int) -> dict[str, bool]:
    """Whether each of ours gives the bytes of `mergekit-yaml` with as many threads."""
    theirs, theirs_alone, one, several = (
        found[name]["digest"] for name, case in cases(workers, 1).items() if case.method == "cart"
    )
    return {"--workers 1": one == theirs, f"--workers {workers}": several == theirs_alone}


def watch(command: Sequence[str], log: Path) -> Cost:
    """Run a command and look at the memory of it and of all that it starts.

    Raises:
        ClickException: it fails.
    """
    begun, peak = time.perf_counter(), 0
    with log.open("w") as output:
        running = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        while running.poll() is None:
            peak = max(peak, sum(_own_memory(running.pid)))
            time.sleep(_EVERY)
    if running.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise click.ClickException(f"{' '.join(command)}: {tail}")
    return Cost(time.perf_counter() - begun, peak)


def _own_memory(pid: int) -> Iterator[int]:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            used = process.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        yield used.rss - getattr(used, "shared", 0)


def digest(folder: Path) -> str:
    """One hash of the weight files of a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def _models(shape: LlamaShape, name: str, console: Console) -> list[Path]:
    folder = cache_root() / name
    if read_manifest(folder) is None:
        console.print(f"making the models in {folder}")
        with new_folder(folder) as temporary:
            # As fine-tuning of the demo's encoders leaves them; rounding to bf16 adds noise.
            write_llama_models(temporary, TUNED, shape=shape, directions=512, decay=0.6, noise=0)
            shutil.rmtree(temporary / "base")  # `cart` has no use for it
            write_json(temporary / MANIFEST, {"tuned": TUNED})
    return [folder / f"tuned-{index}" for index in range(TUNED)]


def markdown(
    conditions: Mapping[str, Any], measured: list[dict[str, Any]], found: Mapping[str, Any]
) -> str:
    """Both tables: the ways beside each other, and where the time goes."""
    where, workers = conditions["machine"], conditions["workers"]
    ways = {name: it for name, it in cases(workers, where["cores"]).items() if name in found}
    medians = {name: _median(found[name]["runs"]) for name in ways}
    usual, same = medians["mergekit-yaml"]["wall"], equal(found, workers)
    rows = [
        [
            f"`{name}`",
            f"{row['wall']:.1f}",
            f"{usual / row['wall']:.2f}" if ways[name].method == "cart" else "",
            f"{row['peak'] / 1e6:,.0f}",
            {True: "equal", False: "DIFFERENT", None: ""}[same.get(name)],
        ]
        for name, row in medians.items()
    ]
    heading = ["way", "wall s", "times as fast", "peak MB", "bytes"]
    ways_table = markdown_table(heading, rows, ["---", "---:", "---:", "---:", "---"])
    counts = sorted({len(found[name]["runs"]) for name, it in ways.items() if not it.is_for_bytes})
    runs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    shape = conditions["shape"]
    return (
        f"`cart` of {TUNED} Llama-shaped models in bf16 ({shape['hidden']} hidden, "
        f"{shape['layers']} layers, {shape['vocabulary']:,} tokens), medians of {runs} processes, "
        f"in turns, from start to exit. {made_by('bench-distributed', measured, _place(where))} "
        "Bytes are compared with those of `mergekit-yaml` by as many threads as a worker has.\n\n"
        f"{ways_table}\n\n{_floor_table(found[FLOOR], medians, workers)}\n"
    )


def _place(machine: Mapping[str, Any]) -> str:
    return f"on {machine['processor']}, {machine['cores']} cores"


def _median(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in ("wall", "peak")}


def _floor_table(
    parts: Mapping[str, float], medians: Mapping[str, Mapping[str, float]], workers: int
) -> str:
    """Where the time goes: parts timed alone, and shared by all workers where they can be."""
    shared = {name: parts[name] / workers for name in ("products", "decompositions", "merging")}
    transfers = parts["reading"] + parts["writing"]
    lowest = transfers + shared["products"]
    beyond = {name: medians[name]["wall"] for name in ("mergekit-yaml", f"--workers {workers}")}
    rows = [
        ["reading all inputs once", f"{parts['reading']:.1f}"],
        ["writing the result once", f"{parts['writing']:.1f}"],
        ["products with the matrices", f"{shared['products']:.1f}"],
        ["floor: these three", f"{lowest:.1f}"],
        ["decompositions, with their products", f"{shared['decompositions']:.1f}"],
        ["means, differences, checks and sums", f"{shared['merging']:.1f}"],
        ["`linear`, a whole process", f"{medians['linear']['wall']:.1f}"],
        *([f"`{name}`, a whole process", f"{wall:.1f}"] for name, wall in beyond.items()),
    ]
    return (
        f"Where the time goes, each part alone; all but reading and writing by one thread, divided "
        f"by {workers}:\n\n{markdown_table(['part', 's'], rows, ['---', '---:'])}"
    )


if __name__ == "__main__":
    main()
