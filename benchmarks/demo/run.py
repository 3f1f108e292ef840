"""`python -m benchmarks.demo.run`: CART beside mergekit's other methods on four image tasks.

Fetches a ViT-S/14 and four tasks, fine-tunes one encoder a task, merges them by each method with
mergekit (`mergekit-yaml`, or the function behind that command), and evaluates every merged model on
all tasks. Each method's setting is picked on the validation split; the test split is used once, for
the picked one. What is finished is kept in the cache and not done again.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine

from benchmarks.common.cache import cache_root, read_manifest, write_json
from benchmarks.common.provenance import provenance
from benchmarks.common.recipes import Candidate, Merge, MergeError
from benchmarks.common.sources import SourceError, fetch
from benchmarks.demo import report, work
from benchmarks.demo.methods import CANDIDATES, OF_TWO
from benchmarks.demo.models import TASKS, fine_tuning
from benchmarks.demo.stages import Stage, Stages

Trial = tuple[Candidate, Merge, dict[str, float]]


@click.command()
@click.option(
    "--tasks", default=",".join(TASKS), show_default=True, help="Tasks to merge, by name."
)
@click.option("--seed", default=0, show_default=True, help="Of the fine-tuning.")
@click.option(
    "--validation-images", default=300, show_default=True, help="A task, to pick settings."
)
@click.option("--test-images", default=500, show_default=True, help="A task, for the table.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/demo"),
    show_default=True,
)
@click.option("--workers", default=2, show_default=True, help="CPU cores to use.")
@click.option(
    "--fresh", is_flag=True, help="Merge and evaluate again (fine-tuned models are kept)."
)
def main(
    tasks: str,
    seed: int,
    validation_images: int,
    test_images: int,
    out: Path,
    workers: int,
    fresh: bool,
) -> None:
    """Fine-tune, merge by each method, evaluate, and print one table."""
    started = time.perf_counter()
    console = Console()
    stages = Stages(console, 4)
    names = [name.strip() for name in tasks.split(",")]
    counts = {"validation": validation_images, "test": test_images}
    try:
        result = run(stages, names, seed, counts, workers, fresh)
    except (SourceError, MergeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", result)
    (out / "table.md").write_text(report.markdown(result))
    report.save_plot(result, out / "accuracy.png")
    report.print_table(result, console)
    report.print_end(console, out, stages.seconds, time.perf_counter() - started)


def run(
    stages: Stages,
    names: Sequence[str],
    seed: int,
    counts: Mapping[str, int],
    workers: int,
    fresh: bool,
) -> dict[str, Any]:
    """Do everything; return the result as a plain dictionary (see `report`).

    Raises:
        SourceError: a download failed.
        MergeError: mergekit failed or lost tensors.
        ValueError: unknown task, or a merged model that does not load whole.
    """
    from benchmarks.vision.tasks import task

    titles = {name: task(name).title for name in names}
    measured = [provenance()]  # before the work: sources may change meanwhile
    stages.console.print(
        f"{len(names)} encoders are fine-tuned, merged and judged: about eight minutes on two "
        f"quiet cores at first. What is finished is kept in {cache_root()}, and the same command "
        "goes on.",
        highlight=False,
        soft_wrap=True,
    )
    with work.Workers(workers) as pool:
        with stages.stage("images and the pretrained encoder", len(names) + 1) as stage:
            base, data = _prepare(pool, stage, names)
        settings = fine_tuning()
        with stages.stage(f"fine-tune one encoder a task ({len(names)})", len(names)) as stage:
            tuned = _finetune(pool, stage, titles, seed, settings)
        common = ((tuple(names), seed, settings), counts, fresh)
        count = len(CANDIDATES) + len(OF_TWO)
        with stages.stage(f"merge {count} recipes with mergekit, validate", count) as stage:
            trials = _merge(pool, stage, tuned, base, common)
            of_two = _merge_two(pool, stage, list(tuned.values())[:2], base)
        best = {
            method: max(tried, key=lambda trial: _mean(trial[2]))
            for method, tried in trials.items()
        }
        # The models of all tasks first: the small jobs fill what is left of the workers' time.
        jobs = {"pretrained": (base, names)}
        jobs |= {method: (merged.folder, names) for method, (_, merged, _) in best.items()}
        jobs |= {f"two {method}": (folder, names[:2]) for method, folder in of_two.items()}
        jobs |= {f"fine-tuned {name}": (folder, [name]) for name, folder in tuned.items()}
        with stages.stage(f"test {len(jobs)} models", len(jobs)) as stage:
            found = _test(pool, stage, jobs, common)
    fine = {name: found[f"fine-tuned {name}"][name] for name in names}
    rows = [
        _row("pretrained", "", found["pretrained"], fine),
        _row("fine-tuned", "one model a task", fine, fine),
        *(
            _row(method, candidate.setting, found[method], fine, merged=True)
            for method, (candidate, _, _) in best.items()
        ),
    ]
    two = {name: fine[name] for name in names[:2]}
    return {
        "tasks": titles,
        "measured": measured,
        "rows": rows,
        "two": [
            _row("fine-tuned", "one model a task", two, two),
            *(_row(method, "", found[f"two {method}"], two, merged=True) for method in of_two),
        ],
        "counts": dict(counts),
        "seed": seed,
        "tensors": trials["cart"][0][1].tensors,
        "fine_tuning": {name: read_manifest(folder) for name, folder in tuned.items()},
        "data": {name: read_manifest(folder) for name, folder in data.items()},
        "grid": [
            {
                "method": candidate.method,
                "setting": candidate.setting,
                "parameters": candidate.parameters,
                "model_parameters": candidate.model_parameters,
                "base_model": candidate.needs_base,
                "validation": scores,
                "validation_mean": _mean(scores),
            }
            for tried in trials.values()
            for candidate, _, scores in tried
        ],
        "versions": _versions(),
    }


def _prepare(
    pool: work.Workers, stage: Stage, names: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """The pretrained encoder and the tasks' images; what has come is unpacked meanwhile."""
    from benchmarks.vision import backbone
    from benchmarks.vision.tasks import task, task_folder

    if read_manifest(backbone.backbone_folder()) is None:
        fetch([backbone.SOURCE], quiet=True)
    first = pool.submit(work.prepare_backbone)
    waiting = {}
    for name in sorted(names, key=lambda name: -len(task(name).sources)):
        if read_manifest(task_folder(name)) is None:
            fetch(task(name).sources, quiet=True)
        waiting[name] = pool.submit(work.prepare_task, name)
        pool.hear(stage.advance)
    for future in pool.finished([first, *waiting.values()], stage.advance):
        future.result()
    return first.result(), {name: waiting[name].result() for name in names}


def _finetune(
    pool: work.Workers, stage: Stage, titles: Mapping[str, str], seed: int, settings: Any
) -> dict[str, Path]:
    jobs = {pool.submit(work.finetune, name, seed, settings): name for name in titles}
    tuned = {}
    for future in pool.finished(jobs, stage.advance):
        name = jobs[future]
        tuned[name] = future.result()
        losses = (read_manifest(tuned[name]) or {})["epoch_losses"]
        stage.tell(f"{titles[name]:12} loss {losses[-1]:.2f} in the last epoch")
    return {name: tuned[name] for name in titles}


def _merge(
    pool: work.Workers, stage: Stage, tuned: Mapping[str, Path], base: Path, common: tuple[Any, ...]
) -> dict[str, list[Trial]]:
    """Each method's settings, tried: by method, in the order of `CANDIDATES`."""
    models = list(tuned.values())
    # The longest first: none is left to run alone in the end.
    order = sorted(CANDIDATES, key=lambda candidate: _SLOWEST.index(candidate.method))
    jobs = {
        pool.submit(work.merge_and_validate, candidate, models, base, *common): candidate
        for candidate in order
    }
    done = {}
    for future in pool.finished(jobs, stage.advance):
        candidate = jobs[future]
        done[candidate.method, candidate.setting] = future.result()
        mean = 100 * _mean(future.result()[1])
        stage.tell(f"{candidate.method:16} {candidate.setting:36} {mean:5.1f}")
    trials: dict[str, list[Trial]] = {}
    for candidate in CANDIDATES:
        tried = done[candidate.method, candidate.setting]
        trials.setdefault(candidate.method, []).append((candidate, *tried))
    return trials


def _merge_two(
    pool: work.Workers, stage: Stage, models: Sequence[Path], base: Path
) -> dict[str, Path]:
    """The first two models merged with nothing to choose, by method."""
    jobs = {pool.submit(work.merge_two, one, models, base): one.method for one in OF_TWO}
    done = {jobs[future]: future.result() for future in pool.finished(jobs, stage.advance)}
    return {one.method: done[one.method] for one in OF_TWO}


_SLOWEST = ("cart_auto", "ties", "cart", "dare_ties", "task_arithmetic", "linear")


def _test(
    pool: work.Workers,
    stage: Stage,
    jobs: Mapping[str, tuple[Path, Sequence[str]]],
    common: tuple[Any, ...],
) -> dict[str, dict[str, float]]:
    waiting = {
        pool.submit(work.test, folder, names, *common): key for key, (folder, names) in jobs.items()
    }
    found = {}
    for future in pool.finished(waiting, stage.advance):
        found[waiting[future]] = future.result()
    return found


def _row(
    method: str,
    setting: str,
    test: dict[str, float],
    fine: dict[str, float],
    merged: bool = False,
) -> dict[str, Any]:
    return {
        "method": method,
        "setting": setting,
        "test": test,
        "mean": _mean(test),
        "share": _mean(test) / _mean(fine),
        "merged": merged,
    }


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _versions() -> dict[str, str]:
    packages = (
        "cart-plugin",
        "mergekit",
        "torch",
        "transformers",
        "safetensors",
        "numpy",
        "pillow",
        "fonttools",
    )
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.demo.run")
