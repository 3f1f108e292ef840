"""`python -m benchmarks.demo.run`: CART beside mergekit's other methods on four image tasks.

Fetches a ViT-S/14 and four tasks, fine-tunes one encoder a task, merges them with the real
`mergekit-yaml` by each method, and evaluates every merged model on all tasks. Each method's setting
is picked on the validation split; the test split is used once, for the picked one. What is finished
is kept in the cache and not done again.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine

from benchmarks.common.cache import cache_root, read_manifest, settings_hash, write_json
from benchmarks.common.recipes import Candidate, Merge, MergeError, merge
from benchmarks.common.sources import SourceError
from benchmarks.demo import report
from benchmarks.demo.models import TASKS

CANDIDATES = (
    Candidate("linear", "average", model_parameters={"weight": 1.0}, needs_base=False),
    *(
        Candidate("task_arithmetic", f"lambda {scale}", {"lambda": scale}, {"weight": 1.0})
        for scale in (0.3, 0.4)
    ),
    *(
        Candidate(
            "ties",
            f"density 0.2, lambda 1, {words}",
            {"lambda": 1.0, "normalize": normalize},
            {"weight": 1.0, "density": 0.2},
        )
        for normalize, words in ((True, "normalised"), (False, "not normalised"))
    ),
    *(
        Candidate(
            "dare_ties",
            f"density {density}, lambda {scale}",
            {"lambda": scale, "normalize": False},
            {"weight": 1.0, "density": density},
        )
        for density, scale in ((0.5, 0.3), (0.2, 0.4))
    ),
    *(
        Candidate(
            "cart",
            f"rank_ratio {ratio}, lambda {scale}",
            {"rank_ratio": ratio, "lambda": scale},
            needs_base=False,
        )
        for ratio, scale in ((0.08, 1.0), (0.16, 2.3))
    ),
    Candidate("cart_auto", "nothing to set", {}, needs_base=False),
)


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
    console = Console()
    names = [name.strip() for name in tasks.split(",")]
    counts = {"validation": validation_images, "test": test_images}
    try:
        result = run(console, names, seed, counts, workers, fresh)
    except (SourceError, MergeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", result)
    (out / "table.md").write_text(report.markdown(result))
    report.save_plot(result, out / "accuracy.png")
    report.print_table(result, console)
    console.print(f"Saved to {out}: results.json, table.md, accuracy.png")


def run(
    console: Console,
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
    console.print(f"Cache: {cache_root()}")
    with console.status("loading libraries"):
        import torch

        from benchmarks.vision.backbone import prepare_backbone
        from benchmarks.vision.finetune import FineTuning, finetune_all, load_head
        from benchmarks.vision.tasks import prepare_task, task

    torch.set_num_threads(max(1, workers))
    console.print("1/4 images and the pretrained encoder")
    base = prepare_backbone()
    data = {name: prepare_task(name) for name in names}
    console.print(f"2/4 fine-tune one encoder a task ({len(names)} tasks)")
    settings = FineTuning()
    tuned = finetune_all(names, seed, settings, workers)
    heads = {name: load_head(name, seed, settings) for name in names}
    evaluator = Evaluator(heads, {name: path.name for name, path in data.items()}, counts, fresh)

    console.print(f"3/4 merge {len(CANDIDATES)} recipes with mergekit-yaml, validate")
    trials: dict[str, list[tuple[Candidate, Merge, dict[str, float]]]] = {}
    for candidate in CANDIDATES:
        with console.status(f"{candidate.method} ({candidate.setting})"):
            merged = merge(candidate, list(tuned.values()), base, fresh=fresh)
            scores = evaluator(merged.folder, "validation")
        trials.setdefault(candidate.method, []).append((candidate, merged, scores))
        console.print(
            f"    {candidate.method:16} {candidate.setting:36} {100 * _mean(scores):5.1f}",
            highlight=False,
        )

    console.print("4/4 test images")
    with console.status("test"):
        fine = {name: evaluator(folder, "test", [name])[name] for name, folder in tuned.items()}
        rows = [
            _row("pretrained", "", evaluator(base, "test"), fine),
            _row("fine-tuned", "one model a task", fine, fine),
        ]
        for method, tried in trials.items():
            candidate, merged, _ = max(tried, key=lambda trial: _mean(trial[2]))
            rows.append(
                _row(method, candidate.setting, evaluator(merged.folder, "test"), fine, merged)
            )
    return {
        "tasks": {name: task(name).title for name in names},
        "rows": rows,
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
                "seconds": merged.seconds,
                "peak_mb": merged.peak_mb,
            }
            for tried in trials.values()
            for candidate, merged, scores in tried
        ],
        "versions": _versions(),
    }


class Evaluator:
    """Accuracy of encoder folders on the demo's tasks, remembered in the cache.

    Args:
        heads: the tasks' heads.
        data: the names of the tasks' data folders, which name their settings.
        counts: images a task by split.
        fresh: evaluate again what the cache knows.
    """

    def __init__(
        self,
        heads: Mapping[str, Any],
        data: Mapping[str, str],
        counts: Mapping[str, int],
        fresh: bool,
    ) -> None:
        self.heads = heads
        self.data = data
        self.counts = counts
        self.fresh = fresh

    def __call__(
        self, folder: Path, split: str, names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Accuracy (0 to 1) by task, of all tasks or the named ones."""
        names = list(self.heads) if names is None else list(names)
        identity = {
            "model": [str(folder), _stamp(folder)],
            "heads": {name: self.heads[name].digest() for name in names},
            "data": {name: self.data[name] for name in names},
            "split": split,
            "images": self.counts[split],
        }
        path = cache_root() / "evaluations" / settings_hash(identity)
        known = None if self.fresh else read_manifest(path)
        if known is not None:
            return {name: known[name] for name in names}
        from benchmarks.vision.evaluate import evaluate_encoder

        heads = {name: self.heads[name] for name in names}
        scores = evaluate_encoder(folder, heads, split, self.counts[split])
        write_json(path / "manifest.json", scores)
        return scores


def _stamp(folder: Path) -> list[int]:
    """Changes when the folder's weights are written anew."""
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))]


def _row(
    method: str,
    setting: str,
    test: dict[str, float],
    fine: dict[str, float],
    merged: Merge | None = None,
) -> dict[str, Any]:
    return {
        "method": method,
        "setting": setting,
        "test": test,
        "mean": _mean(test),
        "share": _mean(test) / _mean(fine),
        "seconds": merged.seconds if merged else None,
        "peak_mb": merged.peak_mb if merged else None,
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
