"""Accuracy of models merged with `svd: fast` beside `svd: exact`: `make bench-accuracy`.

Merges the demo's fine-tuned encoders at each of the demo's settings of `cart`, once with each
solver, and evaluates the merged models on the demo's test images. `fast` gives up some of the
decomposition's accuracy for time; what counts is whether merged models notice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from benchmarks.common.cache import write_json
from benchmarks.common.commands import out_option, publish
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.recipes import MergeError, merge
from benchmarks.common.record import MERGES, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.demo.methods import CANDIDATES
from benchmarks.demo.models import MISSING, TASKS, find_demo_models, fine_tuning

if TYPE_CHECKING:
    from benchmarks.demo.evaluator import Evaluator

LIMIT = 0.3  # points between the means that are allowed
SOLVERS = ("exact", "fast")
PACKAGES = ("mergekit", "torch", "transformers")


@click.command()
@click.option("--test-images", default=500, show_default=True, help="A task.")
@out_option("solvers")
@click.option("--fresh", is_flag=True, help="Merge and evaluate what the cache knows, too.")
def main(test_images: int, out: Path, fresh: bool) -> None:
    """Merge and evaluate with both solvers; the exit code is 1 if their means differ too much."""
    console = Console()
    models = find_demo_models()
    if models is None:
        raise click.ClickException(MISSING)
    base, *tuned = models
    known = conditions(MERGES, PACKAGES)
    measured = [provenance()]  # before the merges: sources may change while they run
    evaluator, titles = _demo_evaluator(test_images, fresh)
    settings = []
    try:
        for candidate in CANDIDATES:
            if candidate.method != "cart":
                continue
            scores, folders = {}, {}
            for solver in SOLVERS:
                with console.status(f"{candidate.setting}, svd {solver}"):
                    with_solver = replace(
                        candidate, parameters=candidate.parameters | {"svd": solver}
                    )
                    merged = merge(with_solver, tuned, base, fresh=fresh)
                    scores[solver] = evaluator(merged.folder, "test")
                    folders[solver] = merged.folder
            weights = weight_difference(folders["exact"], folders["fast"])
            settings.append(
                {"setting": candidate.setting, **comparison(scores), "weights": weights}
            )
    except (MergeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    result = {
        **known,
        "measured": measured,
        "tasks": titles,
        "test_images": test_images,
        "limit": LIMIT,
        "settings": settings,
        "agree": agree(settings),
    }
    write_json(out / "fast_accuracy.json", result)
    publish(markdown(result), out / "fast_accuracy.md", console)
    if not result["agree"]:
        sys.exit(1)


def _demo_evaluator(test_images: int, fresh: bool) -> tuple[Evaluator, dict[str, str]]:
    """The demo's evaluator with its heads, as the demo makes it, and the tasks' titles."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
    from benchmarks.demo.evaluator import Evaluator
    from benchmarks.vision.tasks import task

    titles = {name: task(name).title for name in TASKS}
    return Evaluator.of_tuned(TASKS, 0, fine_tuning(), {"test": test_images}, fresh), titles


def comparison(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Accuracies in per cent with each solver, by task and in the mean, and fast minus exact."""
    by_solver = {}
    for solver in SOLVERS:
        per_cent = {name: 100 * value for name, value in scores[solver].items()}
        by_solver[solver] = per_cent | {"mean": sum(per_cent.values()) / len(per_cent)}
    exact, fast = (by_solver[solver] for solver in SOLVERS)
    return {**by_solver, "difference": {name: fast[name] - exact[name] for name in exact}}


def weight_difference(exact: Path, fast: Path) -> dict[str, float]:
    """How far two merged models are apart: accuracies that agree must not be those of one model.

    Returns:
        `differ`, the number of tensors that are not equal, and `largest`, their largest relative
        difference (Frobenius).
    """
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (exact, fast))
    relative = []
    for name, value in first.items():
        difference = float((second[name] - value).double().norm())
        if difference:
            relative.append(difference / float(value.double().norm()))
    return {"differ": len(relative), "largest": max(relative, default=0.0)}


def agree(settings: list[dict[str, Any]]) -> bool:
    """Whether the means with both solvers differ by less than the limit at every setting."""
    return all(abs(setting["difference"]["mean"]) < LIMIT for setting in settings)


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with a line that says how it was made."""
    names = [*result["tasks"], "mean"]
    heading = ["setting", "svd", *result["tasks"].values(), "mean"]
    ruler = ["---", "---", *["---:"] * len(names)]
    lines = []
    for setting in result["settings"]:
        lines += [
            [setting["setting"], solver, *(f"{setting[solver][name]:.1f}" for name in names)]
            for solver in SOLVERS
        ]
        differences = (f"{setting['difference'][name]:+.2f}" for name in names)
        lines.append([setting["setting"], "difference", *differences])
    table = markdown_table(heading, lines, ruler)
    apart = "; ".join(
        f"{setting['weights']['differ']} tensors by up to {setting['weights']['largest']:.0e} "
        f"({setting['setting']})"
        for setting in result["settings"]
    )
    verdict = "met" if result["agree"] else "missed"
    return (
        f"Test accuracy in per cent, {result['test_images']} images a task, of the demo's four "
        f"encoders merged by `cart` with each solver. Means less than {result['limit']} points "
        f"apart: {verdict}. The merged weights of both solvers differ: {apart}. "
        f"{made_by('bench-accuracy', result['measured'])}\n\n{table}\n"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.solvers.fast_accuracy")
