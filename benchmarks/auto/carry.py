"""`python -m benchmarks.auto.carry`: do the defaults hold for other models than they were made on?

The first 4, 6 and all 8 tasks of the vision and the text suite, and all 8 vision tasks fine-tuned
with a third of the learning rate. In each of these settings CART's rank and lambda are tuned anew
on the validation split of the first seed; the test split of every seed then judges that, CART's
defaults, the plain average, and CART without hyperparameters, which sees no validation split.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.auto.report import write_report
from benchmarks.common.cache import write_json
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.provenance import distinct
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.common.training import in_processes
from benchmarks.suites import GENTLE, Encoders, load_encoders, task_order
from cart_plugin import CartSettings, merge_state_dicts

PACKAGES = ("torch", "transformers")
VALIDATION, TEST = 100, 500  # examples a task
GRID = [
    CartSettings(rank_ratio=ratio, lambda_=scale)
    for ratio in (0.08, 0.16, 0.32)
    for scale in (1.0, 2.0, 3.0, 4.0, 6.0)
]
AUTO = CartSettings(lambda_="auto")
UNTUNED = CartSettings(rank_ratio=0.08)
AVERAGE = CartSettings(rank=0)


@dataclass(frozen=True)
class Setting:
    """Models to merge.

    Attributes:
        suite: `vision` or `text`.
        count: the first so many tasks of the suite.
        gentle: fine-tuned with the smaller learning rate.
        seeds: of the fine-tuning; settings are chosen on the first.
    """

    suite: str
    count: int
    gentle: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def title(self) -> str:
        """Its name in tables."""
        return f"{self.suite}, {self.count} tasks" + (
            f", learning rate {GENTLE:g}" if self.gentle else ""
        )

    def file(self, folder: Path) -> Path:
        """Of its record."""
        return folder / f"{self.suite}-{self.count}{'-gentle' if self.gentle else ''}.json"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Which tasks."""
        return task_order(self.suite)[: self.count]


SETTINGS = (
    *(Setting("vision", count) for count in (4, 6, 8)),
    Setting("vision", 8, gentle=True, seeds=(0,)),
    *(Setting("text", count) for count in (4, 6, 8)),
)


def carry(setting: Setting, folder: Path) -> None:
    """Tune and test in one setting; what is known is not done again."""
    sizes = {"validation": VALIDATION, "test": TEST}
    known = conditions(MERGES, PACKAGES, timed=False, seeds=list(setting.seeds), **sizes)
    record = Record(setting.file(folder), known)

    def judge(encoders: Encoders, settings: CartSettings, split: str, seed: int) -> float:
        key = f"{split} {seed} {_name(settings)}"
        if key not in record.cases:
            merged = merge_state_dicts(encoders.tuned, settings)
            record.put(key, encoders.judge(merged, setting.tasks))
            click.echo(f"{setting.title}: {100 * _mean(record.cases[key]):5.1f} {key}")
        return _mean(record.cases[key])

    first = setting.seeds[0]
    options = (setting.tasks, setting.gentle)
    encoders = load_encoders(setting.suite, first, "validation", VALIDATION, *options)
    tuned = max(GRID, key=lambda settings: judge(encoders, settings, "validation", first))
    for seed in setting.seeds:
        encoders = load_encoders(setting.suite, seed, "test", TEST, *options)
        for settings in (AVERAGE, UNTUNED, tuned, AUTO):
            judge(encoders, settings, "test", seed)
        key = f"test {seed} fine-tuned"
        if key not in record.cases:
            own: dict[str, float] = {}
            for task, tensors in encoders.tuned.items():
                own |= encoders.judge(tensors, [task])
            record.put(key, own)


def results(folder: Path) -> dict[str, Any]:
    """What all settings' records say, as `report.write_report` takes it."""
    rows, measured = [], []
    for setting in SETTINGS:
        record = json.loads(setting.file(folder).read_text())
        cases = record["cases"]
        measured += record["measured"]
        first = setting.seeds[0]
        scores = {
            _name(settings): _mean(cases[f"validation {first} {_name(settings)}"])
            for settings in GRID
        }
        best = max(scores, key=scores.__getitem__)
        names = {
            "average": _name(AVERAGE),
            "CART, its defaults": _name(UNTUNED),
            "CART, tuned here": best,
            "CART without hyperparameters": _name(AUTO),
            "fine-tuned": "fine-tuned",
        }
        rows.append(
            asdict(setting)
            | {"title": setting.title, "tuned": best, "validation": scores}
            | {
                "test": {
                    title: [_mean(cases[f"test {seed} {name}"]) for seed in setting.seeds]
                    for title, name in names.items()
                }
            }
        )
    examples = {"validation": VALIDATION, "test": TEST}
    return {"settings": rows, "examples": examples, "measured": distinct(measured)}


def _mean(accuracies: Mapping[str, float]) -> float:
    return statistics.fmean(accuracies.values())


def _name(settings: CartSettings) -> str:
    if settings.lambda_ == "auto":
        return "auto"
    if settings.rule.keeps_nothing:
        return "average"
    return f"rank_ratio {settings.rank_ratio:g}, lambda {settings.lambda_:g}"


@click.command()
@workers_option
@out_option("auto")
@report_option
def main(workers: int, out: Path, only_report: bool) -> None:
    """Compare CART without hyperparameters with CART tuned anew, on other tasks and models."""
    if not only_report:
        longest_first = sorted(SETTINGS, key=lambda own: -own.count * len(own.seeds))
        in_processes([partial(carry, own, out / "carry") for own in longest_first], workers)
        write_json(out / "carry.json", results(out / "carry"))
    write_report(json.loads((out / "carry.json").read_text()), out)
    click.echo((out / "carry.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.carry")
