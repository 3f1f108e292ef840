"""`python -m benchmarks.twenty` (`make bench-twenty`): up to twenty image tasks merged."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders

from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.training import in_processes
from benchmarks.twenty.report import write_report
from benchmarks.twenty.strength import markdown, strengths
from benchmarks.twenty.suite import number, ranks

SEEDS = (0, 1, 2)


@click.command()
@workers_option
@out_option("twenty")
@report_option
@click.option("--seeds", default="0", show_default=True, help="Of the fine-tuning.")
def main(workers: int, out: Path, only_report: bool, seeds: str) -> None:
    """Fine-tune twenty encoders, and merge 2 to 20 of them by every data-free method."""
    if not only_report:
        strengths(SEEDS[0], out)
        (out / "strength.md").write_text(markdown(out / f"strength-{SEEDS[0]}.json"))
        ranks(SEEDS[0], out)
        chosen = json.loads((out / f"ranks-{SEEDS[0]}.json").read_text())["cases"]
        in_processes(
            [partial(number, int(seed), chosen, out) for seed in seeds.split(",")], workers
        )
    click.echo(write_report(out, SEEDS))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.twenty")
