"""`python -m benchmarks.llm` (`make bench-llm`): merge methods of mergekit on SmolLM2-135M.

Fine-tunes (or finds) one model a task by LoRA; the rest is `benchmarks.common.comparison`, which
runs `mergekit-cart compare` with lm-eval. The methods merge the whole models; at the end, those
named by `--adapters` merge base and adapters (`model+lora`), which has to give the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.common.cache import cache_root, settings_hash
from benchmarks.common.commands import out_option
from benchmarks.common.comparison import Suite, in_threads, share_cores, write_recipe, write_results
from benchmarks.llm.backbone import prepare_backbone
from benchmarks.llm.finetune import FineTuning, finetune_all
from benchmarks.llm.tasks import QUESTIONS, task_name, write_tasks

EXAMPLES = {"validation": 100, "test": 300}

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


def evaluator(tasks: list[str], split: str, examples: int, batch: int = 32) -> list[str]:
    """The options of `compare` that judge a split by lm-eval, in bf16 as LLMs are run."""
    return [
        *("--tasks", ",".join(task_name(name, split) for name in tasks)),
        *("--include-path", str(write_tasks(tasks, split, examples))),
        *("--batch-size", str(batch), "--dtype", "bfloat16"),
    ]


def suites(
    tasks: list[str],
    methods: list[str],
    settings: FineTuning,
    examples: dict[str, int],
    workers: int,
    most: int | None = None,
) -> tuple[Suite, Suite]:
    """Fine-tune what is missing, and write the recipes: of whole models, and of adapters.

    Args:
        tasks: by name.
        methods: by name.
        settings: of the fine-tuning.
        examples: of each task by split.
        workers: processes that fine-tune.
        most: values of each parameter in the grids; all by default.
    """
    base = prepare_backbone()
    tuned = finetune_all(tasks, 0, settings, workers)
    forms: dict[str, dict[str, str]] = {
        "models": {name: str(one.model) for name, one in tuned.items()},
        "adapters": {name: f"{base}+{one.adapter}" for name, one in tuned.items()},
    }
    work = cache_root() / "llm-suite" / settings_hash([tasks, asdict(settings), examples])

    def judge(split: str) -> list[str]:
        return evaluator(tasks, split, examples[split])

    whole, adapters = (
        Suite(
            tasks={name: QUESTIONS[name].title for name in tasks},
            recipes={0: write_recipe(models, base, work / form)},
            evaluator=judge,
            work=work / form,
            grids={
                method: {name: values[:most] for name, values in GRIDS[method].items()}
                for method in methods
            },
        )
        for form, models in forms.items()
    )
    return whole, adapters


@click.command()
@click.option("--tasks", default=",".join(QUESTIONS), help="Tasks, by name.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option("--adapters", default="cart,linear", show_default=True, help="See above.")
@click.option("--workers", default=2, show_default=True, help="Processes at work at a time.")
@click.option("--tiny", is_flag=True, help="A few steps and settings, to see that it runs.")
@out_option("llm")
def main(tasks: str, methods: str, adapters: str, workers: int, tiny: bool, out: Path) -> None:
    """Compare mergekit's methods on the LLM suite."""
    if not set(adapters.split(",")) <= set(methods.split(",")):
        raise click.UsageError("--adapters names methods that --methods does not")
    share_cores(workers)
    settings = FineTuning(examples=32, rank=4) if tiny else FineTuning()
    examples = {"validation": 4, "test": 8} if tiny else EXAMPLES
    whole, as_adapters = suites(
        tasks.split(","),
        methods.split(","),
        settings,
        examples,
        workers,
        most=1 if tiny else None,
    )
    chosen, validation = whole.tune(workers)
    again = {name: chosen[name] for name in adapters.split(",")}
    test, merged_adapters = in_threads(
        [partial(whole.test, chosen, 1), partial(as_adapters.test, again, 1)], workers
    )
    results = whole.results(chosen, validation, test) | {
        "adapters": merged_adapters,
        "fine_tuning": asdict(settings),
        "examples": examples,
    }
    caption = (
        f"Test accuracy in per cent ({examples['test']} examples a task, lm-eval), ± standard "
        "error over the examples. Settings were chosen on the validation split "
        f"({examples['validation']} examples a task), among at most four."
    )
    write_results(results, caption, "bench-llm", out)
    click.echo((out / "table.md").read_text())
