"""`python -m benchmarks.text` (`make bench-text`): merge methods of mergekit on eight texts.

Fine-tunes (or finds) one MiniLM a task and seed; the rest is `benchmarks.common.comparison`, which
runs `mergekit-cart compare`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import out_option
from benchmarks.common.comparison import GRIDS, Suite, share_cores, write_recipe, write_results
from benchmarks.common.data_free import BESIDE_MERGEKIT, merged_models
from benchmarks.text.backbone import prepare_backbone
from benchmarks.text.evaluator import TEST_TEXTS
from benchmarks.text.finetune import FineTuning, finetune_all
from benchmarks.text.tasks import SUITE, TASKS, prepare_task


def evaluator(split: str) -> list[str]:
    """The options of `compare` that judge a split."""
    return ["--evaluator", f"benchmarks.text.evaluator:{split}"]


def suite(seeds: list[int], methods: list[str], workers: int) -> Suite:
    """Fine-tune what is missing, and write the recipes."""
    base = prepare_backbone()
    for name in SUITE:
        prepare_task(name)
    work = cache_root() / "text-suite"
    tuned = {seed: finetune_all(SUITE, seed, workers=workers) for seed in seeds}

    def beside(seed: int) -> list[Path]:
        folders = list(tuned[seed].values())
        return list(merged_models(BESIDE_MERGEKIT, folders, base, work / "beside").values())

    return Suite(
        tasks={name: TASKS[name].title for name in SUITE},
        recipes={
            seed: write_recipe(models, base, work / f"seed{seed}") for seed, models in tuned.items()
        },
        evaluator=evaluator,
        work=work,
        grids={method: GRIDS[method] for method in methods},
        beside=beside,
    )


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option("--workers", default=2, show_default=True, help="Processes at work at a time.")
@out_option("text")
def main(seeds: str, methods: str, workers: int, out: Path) -> None:
    """Compare mergekit's methods on the text suite."""
    share_cores(workers)
    made = suite([int(seed) for seed in seeds.split(",")], methods.split(","), workers)
    results = made.run(workers) | {
        "fine_tuning": asdict(FineTuning()),
        "data": {name: prepare_task(name).name for name in SUITE},
    }
    caption = (
        f"Test accuracy in per cent ({TEST_TEXTS} texts a task), mean of {len(made.recipes)} "
        "fine-tuning seeds ± standard error. Settings were chosen on the validation split of the "
        "first seed, among at most eight."
    )
    write_results(results, caption, "bench-text", out)
    click.echo((out / "table.md").read_text())
