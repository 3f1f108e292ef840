"""Merges by several workers beside `mergekit-yaml` on the same cores: `make bench-distributed`.

Four Llama-shaped models of 1.2 B parameters in bf16. Wall time and memory are of a command with all
of its processes, from start to exit; the bytes of both sides are compared at the same number of
threads, by which products round. The floor is what no program can do without: reading all inputs,
writing the result, and the products, each alone on this machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
import torch
import yaml
from rich.console import Console

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.common.commands import publish, quick_option, runs_option
from benchmarks.common.measure import RESULTS, LlamaShape, machine, write_llama_models
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table
from cart_plugin import CartSettings, merge_tensors
from cart_plugin.checkpoints.reading import Checkpoint, open_folder
from cart_plugin.checkpoints.writing import TensorFile

TUNED = 4
LARGE = LlamaShape(hidden=2048, intermediate=5632, layers=22, heads=16)
SMALL = LlamaShape(hidden=64, intermediate=160, layers=3, heads=4, vocabulary=512)
RATIO = 0.08
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
    """

    program: Sequence[str]
    options: Sequence[str] = ()


def cases(workers: int, cores: int) -> dict[str, Case]:
    """The ways by name; each worker has its share of the cores."""
    here = Path(sys.executable)
    theirs = [str(here.with_name("mergekit-yaml"))]
    ours = [str(here), "-m", "cart_plugin", "merge"]
    share = max(1, cores // workers)
    return {
        "mergekit-yaml": Case(theirs),
        f"mergekit-yaml -j {share}": Case(theirs, ["-j", str(share)]),
        "--workers 1": Case(ours, ["--workers", "1"]),
        f"--workers {workers}": Case(ours, ["--workers", str(workers), "-j", str(share)]),
    }


@click.command()
@quick_option
@runs_option(3)
@click.option("--workers", default=2, show_default=True, help="Of the parallel merge.")
def main(quick: bool, runs: int, workers: int) -> None:
    """Merge in every way in turn; the exit code is 1 if bytes differ."""
    console, cores = Console(), os.cpu_count() or 1
    ways = cases(workers, cores)
    models = _models(SMALL if quick else LARGE, "llama-tiny" if quick else "llama-1b", console)
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=models[0].parent) as scratch:
        recipe = _recipe(Path(scratch), models)
        for run in range(runs):
            for name, case in ways.items():
                console.print(f"{name}, {run + 1} of {runs}", style="dim")
                out = Path(scratch) / "out"
                command = [*case.program, str(recipe), str(out), *case.options]
                command.append("--no-write-model-card")
                found[name].append(watch(command, Path(scratch) / "log"))
                digests[name] = digest(out)
                shutil.rmtree(out)
        lowest = floor(models, Path(scratch), workers)
    yaml_, yaml_share, one, several = digests.values()
    result = {
        "machine": machine(),
        "measured": [provenance()],
        "workers": workers,
        "runs": runs,
        "cases": {name: [asdict(cost) for cost in costs] for name, costs in found.items()},
        "equal": {"--workers 1": one == yaml_, f"--workers {workers}": several == yaml_share},
        "floor": lowest,
    }
    if quick:
        console.print(markdown(result), markup=False)
    else:
        write_json(RESULTS / "speed" / "distributed.json", result)
        publish(markdown(result), RESULTS / "speed" / "distributed.md", console)
    if not all(result["equal"].values()):  # type: ignore[attr-defined]
        sys.exit(1)


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


def floor(models: Sequence[Path], scratch: Path, workers: int) -> dict[str, float]:
    """Seconds of reading, writing and products, each alone; the products shared by the workers."""
    opened = [open_folder(model, model.name) for model in models]
    begun = time.perf_counter()
    for model in opened:
        for name in model.tensors:
            model.read(name)
    reading = time.perf_counter() - begun
    first = opened[0]
    held = {name: first.read(name) for name in first.tensors}
    begun = time.perf_counter()
    with TensorFile(scratch / "floor.safetensors", first.layout) as file:
        for name, tensor in held.items():
            file.write(name, tensor)
    writing = time.perf_counter() - begun
    (scratch / "floor.safetensors").unlink()
    return {"reading": reading, "writing": writing, "products": _products(opened) / workers}


def _products(models: Sequence[Checkpoint]) -> float:
    """Seconds of one thread to merge all tensors; of a shape that comes again, one is merged."""
    shapes = Counter(info.shape for info in models[0].tensors.values())
    example = {info.shape: name for name, info in models[0].tensors.items()}
    threads, total = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        for shape, count in shapes.items():
            name = example[shape]
            tensors = [model.read(name) for model in models]
            begun = time.perf_counter()
            decompose = False if is_table(name) else None
            merge_tensors(tensors, CartSettings(rank_ratio=RATIO), name=name, decompose=decompose)
            total += count * (time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return total


def is_table(name: str) -> bool:
    """Whether a Llama's tensor has a row for each token, and is averaged."""
    return "embed_tokens" in name or "lm_head" in name


def _models(shape: LlamaShape, name: str, console: Console) -> list[Path]:
    folder = cache_root() / name
    if read_manifest(folder) is None:
        console.print(f"making the models in {folder}")
        with new_folder(folder) as temporary:
            write_llama_models(temporary, TUNED, shape=shape)
            write_json(temporary / MANIFEST, {"tuned": TUNED})
    return [folder / f"tuned-{index}" for index in range(TUNED)]


def _recipe(folder: Path, models: Sequence[Path]) -> Path:
    recipe = {
        "merge_method": "cart",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"rank_ratio": RATIO},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with a line that says what was merged and where."""
    where, lowest = result["machine"], result["floor"]
    medians = {
        name: {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in ("wall", "peak")}
        for name, runs in result["cases"].items()
    }
    usual = medians["mergekit-yaml"]["wall"]
    rows = [
        [
            name,
            f"{row['wall']:.1f}",
            f"{usual / row['wall']:.2f}",
            f"{row['peak'] / 1e6:,.0f}",
            {True: "equal", False: "DIFFERENT", None: ""}[result["equal"].get(name)],
        ]
        for name, row in medians.items()
    ]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lowest.items())
    heading = ["way", "wall s", "times as fast", "peak MB", "bytes"]
    table = markdown_table(heading, rows, ["---", "---:", "---:", "---:", "---"])
    return (
        f"`cart` of {TUNED} Llama-shaped models, medians of {result['runs']}, {where['cores']} "
        f"cores ({where['processor']}), load {where['load_average']} before. Floor: {parts}. "
        f"{made_by('bench-distributed', result['measured'])}\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
