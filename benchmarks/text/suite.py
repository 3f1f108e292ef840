"""`python -m benchmarks.text` (`make bench-text`): merge methods of mergekit on eight texts.

Fine-tunes (or finds) one MiniLM a task and seed; the rest is `benchmarks.common.comparison`, which
runs `mergekit-cart compare`. What mergekit has not comes from FusionBench
(`benchmarks.text.fusion`), as folders that `compare` judges beside its own rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from torch import Tensor

from benchmarks.common.beside import BESIDE_MERGEKIT, Point, merged_models, slug, tune
from benchmarks.common.beside import GRIDS as BESIDE_GRIDS
from benchmarks.common.cache import cache_root
from benchmarks.common.commands import named, out_option
from benchmarks.common.compared import write_results
from benchmarks.common.comparison import GRIDS, Suite, share_cores, write_recipe
from benchmarks.text import fusion
from benchmarks.text.backbone import prepare_backbone
from benchmarks.text.encoder import load_encoder, load_tokenizer
from benchmarks.text.evaluator import TEST_TEXTS, VALIDATION_TEXTS, shares
from benchmarks.text.finetune import FineTuning, finetune_all
from benchmarks.text.tasks import SUITE, TASKS, prepare_task


def evaluator(split: str) -> list[str]:
    """The options of `compare` that judge a split."""
    return ["--evaluator", f"benchmarks.text.evaluator:{split}"]


# FusionBench merges its own.
IN_MEMORY = {slug(name): name for name in BESIDE_MERGEKIT if slug(name) not in fusion.METHODS}


def suite(
    seeds: list[int],
    methods: list[str],
    workers: int,
    through_fusion_bench: list[str],
    in_memory: list[str],
) -> tuple[Suite, dict[str, Point], list[dict[str, Any]]]:
    """Fine-tune what is missing, tune what mergekit has not, and write the recipes.

    Returns:
        The comparison, and the chosen settings and validation rows of what mergekit has not.
    """
    base = prepare_backbone()
    for name in SUITE:
        prepare_task(name)
    work = cache_root() / "text-suite"
    tuned = {seed: finetune_all(SUITE, seed, workers=workers) for seed in seeds}
    first = seeds[0]

    pools = {seed: fusion.pool(models, base) for seed, models in tuned.items()}
    place = work / "fusion-bench"
    fused, rows = fusion.tune(through_fusion_bench, pools[first], place)

    encoder, tokenizer = load_encoder(base), load_tokenizer(base)

    def judge(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        encoder.load_state_dict(dict(tensors))
        return shares(encoder, tokenizer, "validation", VALIDATION_TEXTS)

    names = [IN_MEMORY[name] for name in in_memory]
    chosen, more = tune(names, tuned[first], base, judge, work / "beside" / "validation.json")

    def beside(seed: int) -> list[Path]:
        folders = list(tuned[seed].values())
        found = list(merged_models(chosen, folders, base, work / "beside").values())
        return found + [
            fusion.merged(key, point, pools[seed], place) for key, point in fused.items()
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
    return made, fused | {slug(name): point for name, point in chosen.items()}, rows + more


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option(
    "--fusion-bench", "fused", default=",".join(fusion.METHODS), help="Its methods; all by default."
)
@click.option(
    "--beside", default=",".join(IN_MEMORY), help="Methods that neither has; all by default."
)
@click.option("--adds", is_flag=True, help="Leave the rows of other methods as they are.")
@click.option("--workers", default=2, show_default=True, help="Processes at work at a time.")
@out_option("text")
def main(
    seeds: str, methods: str, fused: str, beside: str, adds: bool, workers: int, out: Path
) -> None:
    """Compare mergekit's methods, FusionBench's and others on the text suite."""
    share_cores(workers)
    through, in_memory = (
        named(option, text, known)
        for option, text, known in (
            ("--fusion-bench", fused, fusion.METHODS),
            ("--beside", beside, IN_MEMORY),
        )
    )
    made, chosen, rows = suite(
        [int(seed) for seed in seeds.split(",")],
        methods.split(","),
        workers,
        through,
        in_memory,
    )
    results = made.run(workers)
    results["chosen"] |= chosen
    results |= {
        "grids_beside": {key: {**fusion.METHODS[key].grid} for key in through}
        | {key: BESIDE_GRIDS.get(IN_MEMORY[key], {}) for key in in_memory},
        "validation_beside": rows,
        "fine_tuning": asdict(FineTuning()),
        "data": {name: prepare_task(name).name for name in SUITE},
    }
    caption = (
        f"Test accuracy in per cent ({TEST_TEXTS} texts a task), mean of {len(made.recipes)} "
        "fine-tuning seeds ± standard error. Settings were chosen on the validation split of the "
        "first seed, among at most eight; ASWUDI has none."
    )
    write_results(results, caption, "bench-text", out, adds=adds)
    click.echo((out / "table.md").read_text())
