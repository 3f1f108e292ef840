"""`python -m benchmarks.text` (`make bench-text`): merge methods of mergekit on eight texts.

Fine-tunes (or finds) one MiniLM a task and seed; the rest is `benchmarks.common.comparison`, which
runs `mergekit-cart compare`. What mergekit has not comes from FusionBench
(`benchmarks.text.fusion`), as folders that `compare` judges beside its own rows.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import out_option
from benchmarks.common.comparison import GRIDS, Suite, share_cores, write_recipe, write_results
from benchmarks.common.data_free import BESIDE_MERGEKIT, merged_models
from benchmarks.common.fusion import Point
from benchmarks.text import fusion
from benchmarks.text.backbone import prepare_backbone
from benchmarks.text.evaluator import TEST_TEXTS
from benchmarks.text.finetune import FineTuning, finetune_all
from benchmarks.text.tasks import SUITE, TASKS, prepare_task


def evaluator(split: str) -> list[str]:
    """The options of `compare` that judge a split."""
    return ["--evaluator", f"benchmarks.text.evaluator:{split}"]


# Of these, FusionBench's own are tuned.
IN_MEMORY = tuple(name for name in BESIDE_MERGEKIT if name.lower() not in fusion.METHODS)


def suite(
    seeds: list[int], methods: list[str], workers: int, through_fusion_bench: list[str]
) -> tuple[Suite, dict[str, Point], list[dict[str, Any]]]:
    """Fine-tune what is missing, tune FusionBench's methods, and write the recipes.

    Returns:
        The comparison, and FusionBench's methods' chosen settings and validation rows.
    """
    base = prepare_backbone()
    for name in SUITE:
        prepare_task(name)
    work = cache_root() / "text-suite"
    tuned = {seed: finetune_all(SUITE, seed, workers=workers) for seed in seeds}

    pools = {seed: fusion.pool(models, base) for seed, models in tuned.items()}
    place = work / "fusion-bench"
    chosen, rows = fusion.tune(through_fusion_bench, pools[seeds[0]], place)

    def beside(seed: int) -> list[Path]:
        folders = list(tuned[seed].values())
        found = list(merged_models(IN_MEMORY, folders, base, work / "beside").values())
        return found + [
            fusion.merged(key, point, pools[seed], place) for key, point in chosen.items()
        ]

    made = Suite(
        tasks={name: TASKS[name].title for name in SUITE},
        recipes={
            seed: write_recipe(models, base, work / f"seed{seed}") for seed, models in tuned.items()
        },
        evaluator=evaluator,
        work=work,
        grids={method: GRIDS[method] for method in methods},
        beside=beside,
    )
    return made, chosen, rows


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option(
    "--fusion-bench", "fused", default=",".join(fusion.METHODS), help="Its methods; all by default."
)
@click.option("--workers", default=2, show_default=True, help="Processes at work at a time.")
@out_option("text")
def main(seeds: str, methods: str, fused: str, workers: int, out: Path) -> None:
    """Compare mergekit's and FusionBench's methods on the text suite."""
    share_cores(workers)
    through = [key for key in fused.split(",") if key]
    if unknown := sorted(set(through) - set(fusion.METHODS)):
        known = ", ".join(fusion.METHODS)
        raise click.BadParameter(f"--fusion-bench: {', '.join(unknown)}; there are {known}")
    made, chosen, rows = suite(
        [int(seed) for seed in seeds.split(",")], methods.split(","), workers, through
    )
    results = made.run(workers)
    results["chosen"] |= chosen
    results |= {
        "fusion_bench": {key: {**fusion.METHODS[key].grid} for key in through},
        "validation_fusion_bench": rows,
        "fine_tuning": asdict(FineTuning()),
        "data": {name: prepare_task(name).name for name in SUITE},
    }
    caption = (
        f"Test accuracy in per cent ({TEST_TEXTS} texts a task), mean of {len(made.recipes)} "
        "fine-tuning seeds ± standard error. Settings were chosen on the validation split of the "
        "first seed, among at most eight; ASWUDI, SWUDI, ACE and DC-Merge are at their authors'."
    )
    write_results(results, caption, "bench-text", out)
    click.echo((out / "table.md").read_text())
