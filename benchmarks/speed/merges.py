"""Whole `mergekit-yaml` runs, cart beside other methods, and how cart grows: `make bench-merge`.

Every run is a process of its own, measured from start to exit. The cases take turns, so that a
change of the machine's load meets them all; tables come from medians. Models that are made for
this benchmark lie in the cache meanwhile (about 8 GB) and are removed when all is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.common.commands import progress, quick_option, resume_option
from benchmarks.common.gpu import card, gpu_results
from benchmarks.common.measure import RESULTS, LlamaShape, measure
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.demo.models import MISSING, find_demo_models
from benchmarks.speed import report
from benchmarks.speed.floor import floor

PACKAGES = ("mergekit", "torch", "scipy", "transformers", "safetensors")
TUNED = 4
RATIO = {"rank_ratio": 0.08}


@dataclass(frozen=True)
class Method:
    """What a recipe says beside its models.

    Attributes:
        merge_method: mergekit's name of it.
        base: whether the recipe names a base model.
        parameters: of the recipe.
        plain: needs `benchmarks/speed/plain_cart.py` in the place of `mergekit-yaml`.
    """

    merge_method: str
    base: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


METHODS = {
    "linear": Method("linear"),
    "ties": Method("ties", base=True, parameters={"density": 0.2}),
    "dare_ties": Method("dare_ties", base=True, parameters={"density": 0.5}),
    "cart, auto": Method("cart", parameters={**RATIO, "svd": "auto"}),
    "cart, exact": Method("cart", parameters={**RATIO, "svd": "exact"}),
    "cart, fast": Method("cart", parameters={**RATIO, "svd": "fast"}),
    "cart_auto": Method("cart_auto"),
    "cart_auto, base": Method("cart_auto", base=True),
    "plain full SVD": Method("plain_cart", parameters=RATIO, plain=True),
}


@dataclass(frozen=True)
class Models:
    """Llama-shaped models to merge: their sizes, and how many fine-tuned ones of them.

    Attributes:
        shape: their sizes.
        tuned: how many fine-tuned ones.
        noise: share of the differences' energy without a decaying spectrum.
        directions: of the decaying spectrum; all if None, which takes long of large matrices.
    """

    shape: LlamaShape
    tuned: int = TUNED
    noise: float = 0.0
    directions: int | None = None

    @property
    def folder(self) -> Path:
        """Where they lie in the cache; whatever number of them."""
        sizes = "-".join(str(size) for size in asdict(self.shape).values())
        noisy = f"-noise-{self.noise:g}" if self.noise else ""
        low = f"-low-{self.directions}" if self.directions else ""
        return cache_root() / "merge-speed" / f"llama-{sizes}{noisy}{low}"

    def write(self, tuned: int) -> None:
        """Write them, in another process: torch would count into this one's memory."""
        if (read_manifest(self.folder) or {}).get("tuned", 0) >= tuned:
            return
        with new_folder(self.folder) as temporary:
            program = (
                "import sys; from pathlib import Path; from benchmarks.common.measure import *; "
                f"write_llama_models(Path(sys.argv[1]), {tuned}, shape={self.shape}, "
                # As fine-tuning of the demo's encoders leaves them; rounding to bf16 adds noise.
                f"directions={self.directions}, decay=0.6, noise={self.noise})"
            )
            measure([sys.executable, "-c", program, temporary], temporary / "log.txt")
            write_json(temporary / MANIFEST, {"tuned": tuned})

    def paths(self) -> list[Path]:
        """The base first, then the fine-tuned ones."""
        tuned = (self.folder / f"tuned-{index}" for index in range(self.tuned))
        return [self.folder / "base", *tuned]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        series: which table or curve it belongs to.
        label: what differs within the series: a method, a size.
        method: how to merge.
        models: what to merge: made for it, or folders, the base first.
        dtype: of the recipe; the models' if None.
        options: mergekit's.
    """

    series: str
    label: str
    method: Method
    models: Models | tuple[Path, ...]
    dtype: str | None = None
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its key in the results."""
        return f"{self.series} | {self.label}"

    def paths(self) -> Sequence[Path]:
        """The models' folders, the base first."""
        return self.models.paths() if isinstance(self.models, Models) else self.models

    def size(self) -> dict[str, Any]:
        """The models' sizes, for the results."""
        if isinstance(self.models, Models):
            return {**asdict(self.models.shape), "models": self.models.tuned}
        return {"models": len(self.models) - 1}


def llama(hidden: int, layers: int, vocabulary: int = 32000) -> LlamaShape:
    """The sizes of a Llama with heads of 64 and an MLP 2.75 times as wide as its hidden state."""
    return LlamaShape(hidden, hidden * 11 // 4, layers, hidden // 64, vocabulary)


def model_sets(console: Console, quick: bool) -> dict[str, Models | tuple[Path, ...]]:
    """The models that methods are compared on, by name; the demo's if there are any."""
    main_shape = llama(64, 2, 256) if quick else llama(1024, 8)
    sets: dict[str, Models | tuple[Path, ...]] = {"Llama": Models(main_shape)}
    demo = None if quick else find_demo_models()
    if demo is not None:
        sets["DINOv2 ViT-S"] = tuple(demo)
    elif not quick:
        console.print(f"Left out the vision models: {MISSING}")
    return sets


BARS = ("linear", "ties", "dare_ties", "cart, auto", "cart_auto", "cart_auto, base")

# A layer of Llama 3 8B, with few rows in its tables.
LAYER = Models(LlamaShape(4096, 14336, 1, 32, 1024, shared=4), noise=0.1, directions=64)
CUDA = ("linear", "ties", "cart, auto", "cart_auto", "cart_auto, base")


def cuda_cases(quick: bool) -> list[Case]:
    """The methods on the GPU, without those that take full SVDs; and ours in fp32."""
    models, of = LAYER, "methods on a layer of Llama 3 8B"
    if quick:
        models, of = Models(llama(64, 2, 256)), "methods on Llama"
    cases = [Case("start", "tiny", METHODS["cart, auto"], Models(llama(64, 1, 256), 3))]
    cases += [Case(of, label, METHODS[label], models) for label in CUDA]
    cases += [
        Case(f"{of}, in fp32", label, METHODS[label], models, "float32")
        for label in ("cart, auto", "cart_auto")
    ]
    return [replace(case, options=("--cuda",)) for case in cases]


def growth_cases(quick: bool) -> list[Case]:
    """Cart on more models and wider ones, and on next to nothing."""
    cart = METHODS["cart, auto"]
    start = Case("start", "tiny", cart, Models(llama(64, 1, 256), 3))
    if quick:
        counts = [Case("models", str(n), cart, Models(llama(64, 2, 256), n)) for n in (3, 4)]
        return [start, *counts]
    return [
        start,
        *(Case("models", str(n), cart, Models(llama(1024, 4), n)) for n in (3, 4, 8, 16)),
        *(Case("hidden", str(n), cart, Models(llama(n, 4))) for n in (512, 1024, 2048)),
    ]


@click.command()
@click.option("--runs", type=int, help="Of each case; default 3, with --quick 1.")
@quick_option
@click.option("--growth/--no-growth", default=True, help="Measure how cart's time grows.")
@click.option("--bars", is_flag=True, help="Only what the bars against others rest on: 7 min.")
@click.option("--cuda", is_flag=True, help="On the GPU: a layer of Llama 3 8B, one run.")
@resume_option
@click.option("--keep-models", is_flag=True, help="Leave the models in the cache.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.")
def main(
    runs: int | None,
    quick: bool,
    growth: bool,
    bars: bool,
    cuda: bool,
    resume: bool,
    keep_models: bool,
    out: Path | None,
) -> None:
    """Measure merges; results go to benchmarks/results, or with --quick to the cache."""
    console = Console()
    runs = runs or (1 if quick or cuda else 3)
    place = RESULTS / "speed" / ("merge_bars" if bars else "merge_speed")
    place = gpu_results() / "merges" if cuda else place
    out = out or (cache_root() / "merge-speed-quick" if quick else place)
    gpu: dict[str, Any] = {"gpu": card()} if cuda else {}
    record = Record(out / "results.json", conditions(MERGES, PACKAGES, quick=quick, **gpu), resume)
    if record.discarded:
        console.print(f"Starting anew: {out / 'results.json'} was {record.discarded}")

    sets = {} if cuda else model_sets(console, quick)
    cases = [
        Case(f"methods on {name}", label, method, models)
        for name, models in sets.items()
        for label, method in METHODS.items()
    ]
    if cuda:
        cases = cuda_cases(quick)
    elif bars:
        llamas = [case for case in cases if case.series.endswith("Llama") and case.label in BARS]
        cases, sets = [*llamas, *growth_cases(quick)[:1]], {}
    elif growth:
        cases += growth_cases(quick)
    # On a GPU that is lent for minutes what is measured when the time is over counts.
    with progress(console) as bar, suppress(KeyboardInterrupt) if cuda else nullcontext():
        run_all(cases, runs, record, bar)
        for name, models in sets.items():
            _compare_solvers(name, models, record, bar)
        if not cuda and report.FLOOR not in record.cases:
            _measure_floor(cases, record, bar)
    (out / "table.md").write_text(report.markdown(record.conditions, record.measured, record.cases))
    report.save_plot(record.cases, out / "merge_speed.png")
    for table in report.console_tables(record.conditions, record.cases):
        console.print(table)
    console.print(f"Saved to {out}: results.json, table.md, merge_speed.png")
    if not keep_models:
        shutil.rmtree(cache_root() / "merge-speed", ignore_errors=True)


def _measure_floor(cases: Sequence[Case], record: Record, bar: Progress) -> None:
    """The floor of the Llamas that methods are compared on."""
    models = next(case.models for case in cases if case.series == "methods on Llama")
    assert isinstance(models, Models)
    _write_models([models], bar)
    parts = floor(models.paths()[1:], models.folder)
    record.put(report.FLOOR, {**parts, "cores": os.cpu_count() or 1})


def run_all(cases: Sequence[Case], runs: int, record: Record, bar: Progress) -> None:
    """Run each case as often as it lacks runs, all cases in turns."""
    made = {case.key: len(record.cases.get(case.key, {"runs": []})["runs"]) for case in cases}
    due = [case for case in cases if made[case.key] < runs]
    _write_models((case.models for case in due), bar)
    task = bar.add_task("merging", total=sum(runs - made[case.key] for case in due))
    for round_ in range(runs):
        for case in due:
            if made[case.key] > round_:
                continue
            bar.update(task, description=f"merging: {case.key}")
            with merged(case.method, case.paths(), case.dtype, case.options) as (_, needed):
                known = record.cases.get(case.key, {"runs": []})["runs"]
                value = {"series": case.series, "label": case.label, "size": case.size()}
                record.put(case.key, {**value, "runs": [*known, needed]}, adds=True)
            bar.advance(task)


def _write_models(models: Iterable[Models | tuple[Path, ...]], bar: Progress) -> None:
    most: dict[Models, int] = {}  # by all but their number
    for one in models:
        if isinstance(one, Models):
            kind = replace(one, tuned=0)
            most[kind] = max(one.tuned, most.get(kind, 0))
    if not most:
        return
    task = bar.add_task("making models", total=len(most))
    for kind, tuned in most.items():
        kind.write(tuned)
        bar.advance(task)


@contextmanager
def merged(
    method: Method,
    models: Sequence[Path],
    dtype: str | None = None,
    options: Sequence[str] = (),
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Merge into a folder that vanishes again; yields it, and what the merge needed."""
    base, *tuned = map(str, models)
    recipe: dict[str, Any] = {
        "merge_method": method.merge_method,
        "models": [{"model": model} for model in tuned],
        "parameters": method.parameters,
    }
    if not method.plain:
        for model in recipe["models"]:
            model["parameters"] = {"weight": 1.0}
    if method.base:
        recipe["base_model"] = base
    if dtype:
        recipe["dtype"] = dtype
    command = [str(Path(sys.executable).with_name("mergekit-yaml"))]
    if method.plain:
        command = [sys.executable, str(Path(__file__).with_name("plain_cart.py"))]
    place = cache_root()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".merge-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command += [str(folder / "recipe.yaml"), str(folder / "out"), "--no-write-model-card"]
        command += options
        load = round(os.getloadavg()[0], 1)
        needed = asdict(measure(command, folder / "log.txt")) | {"load_before": load}
        if not any((folder / "out").glob("*.safetensors")):
            raise click.ClickException(f"{method.merge_method} wrote no weights")
        yield folder / "out", needed


def _compare_solvers(
    name: str, models: Models | tuple[Path, ...], record: Record, bar: Progress
) -> None:
    """How far `fast` and `auto` are from `exact` in the merged weights, in fp32, not timed."""
    key = f"accuracy on {name}"
    if key in record.cases:
        return
    _write_models([models], bar)
    paths = models.paths() if isinstance(models, Models) else models
    task = bar.add_task(key, total=4)
    with (
        merged(METHODS["linear"], paths, "float32") as (centre, _),
        merged(METHODS["cart, exact"], paths, "float32") as (exact, _),
    ):
        bar.advance(task, 2)
        for label in ("cart, fast", "cart, auto"):
            with merged(METHODS[label], paths, "float32") as (other, _):
                record.put(f"{key} | {label}", _difference(other, exact, centre))
            bar.advance(task)
    record.put(key, {"done": True})


def _difference(one: Path, other: Path, centre: Path) -> dict[str, float]:
    """Relative difference of what two merges add to the mean: of all tensors, and of the worst."""
    import torch
    from safetensors import safe_open

    difference = added = worst = 0.0
    for path in sorted(other.glob("*.safetensors")):
        with (
            safe_open(one / path.name, "pt") as left,
            safe_open(path, "pt") as right,
            safe_open(centre / path.name, "pt") as middle,
        ):
            for name in right.keys():  # noqa: SIM118  (no mapping)
                a, b, c = (file.get_tensor(name).double() for file in (left, right, middle))
                apart, size = float((a - b).square().sum()), float((b - c).square().sum())
                difference, added = difference + apart, added + size
                # What is averaged differs from the mean by rounding only.
                if b.ndim == 2 and size > 1e-10 * float(torch.sum(c * c)):
                    worst = max(worst, apart / size)
    return {"relative_difference": (difference / added) ** 0.5, "worst_tensor": worst**0.5}


if __name__ == "__main__":
    main()
