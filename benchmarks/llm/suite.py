"""`python -m benchmarks.llm` (`make bench-llm`): merge methods of mergekit on SmolLM2-135M.

Fine-tunes (or finds) one model a task by LoRA, all of a seed from one start or each from its own,
since that decides how much their row spaces have in common. The rest is
`benchmarks.common.comparison`, which runs `mergekit-cart compare` with lm-eval. The methods merge
the whole models; those named by `--adapters` merge base and adapters (`model+lora`), too, which has
to give the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.common.beside import BESIDE_MERGEKIT, merged_models, slug
from benchmarks.common.cache import cache_root, settings_hash
from benchmarks.common.commands import named, out_option
from benchmarks.common.compared import write_results
from benchmarks.common.comparison import Suite, share_cores, write_recipe
from benchmarks.llm.backbone import prepare_backbone
from benchmarks.llm.finetune import FineTuning, Tuned, finetune_all
from benchmarks.llm.tasks import QUESTIONS, task_name, write_tasks

EXAMPLES = {"validation": 100, "test": 300}
STARTS = ("one", "own")  # a seed's adapters begin with the same A, or each with its own

# Half of the text suite's points: an evaluation takes a minute.
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "linear": {},
    "task_arithmetic": {"lambda": (1, 2, 3, 4)},
    "ties": {"density": (0.2,), "lambda": (0.5, 1, 2, 4)},
    "dare_ties": {"density": (0.5,), "lambda": (1, 2, 3, 4)},
    "model_stock": {},
    "cart": {"rank": (8, 16), "lambda": (1, 2)},
    "cart_auto": {},
}

BESIDE = {slug(name): name for name in BESIDE_MERGEKIT}


def evaluator(tasks: list[str], split: str, examples: int, batch: int = 32) -> list[str]:
    """The options of `compare` that judge a split by lm-eval, in fp32, as they were trained."""
    return [
        *("--tasks", ",".join(task_name(name, split) for name in tasks)),
        *("--include-path", str(write_tasks(tasks, split, examples))),
        *("--batch-size", str(batch), "--dtype", "float32"),
    ]


def work_folder(tasks: list[str], settings: FineTuning, examples: dict[str, int]) -> Path:
    """The folder of all comparisons of a kind of fine-tuning."""
    identity = settings_hash([tasks, asdict(settings), examples])
    return cache_root() / "llm-suite" / identity


def merged_beside(
    tuned: Mapping[str, Tuned], base: Path, work: Path, methods: Sequence[str]
) -> dict[str, Path]:
    """The models that are merged by methods which mergekit has not, as their authors set them."""
    folders = [one.model for one in tuned.values()]
    authors: dict[str, dict[str, float]] = {method: {} for method in methods}
    return merged_models(authors, folders, base, work / "beside")


def suites(
    tasks: list[str],
    methods: list[str],
    settings: FineTuning,
    examples: dict[str, int],
    seeds: list[int],
    workers: int,
    beside: Sequence[str] = (),
    most: int | None = None,
) -> tuple[Suite, Suite]:
    """Fine-tune what is missing, and write the recipes: of whole models, and of adapters.

    Args:
        tasks: by name.
        methods: by name.
        settings: of the fine-tuning.
        examples: of each task by split.
        seeds: of the fine-tuning; adapters are merged of the first one.
        workers: processes that fine-tune.
        beside: methods that mergekit has not.
        most: values of each parameter in the grids; all by default.
    """
    base = prepare_backbone()
    tuned = {seed: finetune_all(tasks, seed, settings, workers) for seed in seeds}
    first = tuned[seeds[0]]
    work = work_folder(tasks, settings, examples)

    def judge(split: str) -> list[str]:
        return evaluator(tasks, split, examples[split])

    def merged(seed: int) -> list[Path]:
        return list(merged_beside(tuned[seed], base, work, beside).values())

    def recipe(models: Mapping[str, str | Path], folder: Path) -> Path:
        return write_recipe(models, base, folder)

    common: dict[str, Any] = {
        "tasks": {name: QUESTIONS[name].title for name in tasks},
        "evaluator": judge,
        "grids": {
            method: {name: values[:most] for name, values in GRIDS[method].items()}
            for method in methods
        },
    }
    whole = Suite(
        recipes={
            seed: recipe({name: one.model for name, one in models.items()}, work / f"seed{seed}")
            for seed, models in tuned.items()
        },
        work=work / "models",
        beside=merged,
        **common,
    )
    pairs = {name: f"{base}+{one.adapter}" for name, one in first.items()}
    adapters = Suite(
        recipes={seeds[0]: recipe(pairs, work / "adapters")}, work=work / "adapters", **common
    )
    return whole, adapters


def compare(
    methods: list[str],
    adapters: list[str],
    settings: FineTuning,
    tasks: list[str],
    seeds: list[int],
    workers: int,
    out: Path,
    *,
    beside: Sequence[str],
    adds: bool,
    tiny: bool,
) -> None:
    """Compare the methods on one kind of fine-tuning, and write the results."""
    examples = {"validation": 4, "test": 8} if tiny else EXAMPLES
    most = 1 if tiny else None
    whole, as_adapters = suites(tasks, methods, settings, examples, seeds, workers, beside, most)
    chosen, validation = whole.tune(workers)
    test = whole.test(chosen, workers)
    again = {name: chosen[name] for name in adapters}
    results = whole.results(chosen, validation, test) | {
        "adapters": as_adapters.test(again, workers) if again else {},
        "fine_tuning": asdict(settings),
        "examples": examples,
    }
    count = len(seeds)
    spread = (
        f"mean of {count} fine-tuning seeds ± standard error"
        if count > 1
        else ("one fine-tuning seed, ± standard error over the examples")
    )
    start = (
        "one start (a seed's adapters begin alike)" if settings.one_start else "starts of their own"
    )
    caption = (
        f"Test accuracy in per cent ({examples['test']} examples a task, lm-eval), {spread}; "
        f"adapters from {start}. Settings were chosen on the validation split of the first seed "
        f"({examples['validation']} examples a task), among at most four."
    )
    write_results(results, caption, "bench-llm", out, adds=adds)
    click.echo((out / "table.md").read_text())


@click.command()
@click.option("--tasks", default=",".join(QUESTIONS), help="Tasks, by name.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option("--adapters", default="", help="Methods that merge base and adapters, too.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--starts", default=",".join(STARTS), show_default=True, help="Of the adapters.")
@click.option("--beside", default=",".join(BESIDE), help="Methods that mergekit has not.")
@click.option("--adds", is_flag=True, help="Leave the rows of other methods and seeds as they are.")
@click.option("--workers", default=2, show_default=True, help="Processes at work at a time.")
@click.option("--tiny", is_flag=True, help="A few steps and settings, to see that it runs.")
@out_option("llm")
def main(
    tasks: str,
    methods: str,
    adapters: str,
    seeds: str,
    starts: str,
    beside: str,
    adds: bool,
    workers: int,
    tiny: bool,
    out: Path,
) -> None:
    """Compare mergekit's methods, and others, on the LLM suite."""
    of_adapters = [name for name in adapters.split(",") if name]
    if not set(of_adapters) <= set(methods.split(",")):
        raise click.UsageError("--adapters names methods that --methods does not")
    if not set(starts.split(",")) <= set(STARTS):
        raise click.UsageError(f"--starts are of {', '.join(STARTS)}")
    share_cores(workers)
    settings = FineTuning(examples=32, rank=4) if tiny else FineTuning()
    for start in starts.split(","):
        compare(
            methods.split(","),
            of_adapters,
            replace(settings, one_start=start == "one"),
            tasks.split(","),
            [int(seed) for seed in seeds.split(",")],
            workers,
            out if start == "one" else out / "own_starts",
            beside=[BESIDE[name] for name in named("--beside", beside, BESIDE)],
            adds=adds,
            tiny=tiny,
        )
