"""`python -m benchmarks.compression.speed`: what `compress` and `mergekit-extract-lora` cost.

Whole commands on the same models at the same rank, in turns: one `compress` for all models, and one
`mergekit-extract-lora` a model, whose times are added up and whose largest peak counts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from benchmarks.common.commands import out_option, progress, publish, quick_option, runs_option
from benchmarks.common.measure import Measurement, measure
from benchmarks.common.provenance import made_by
from benchmarks.common.record import COMPRESSES, Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.compression.methods import extract_command
from benchmarks.speed.merges import Models, llama

PACKAGES = ("mergekit", "peft", "torch", "transformers", "safetensors")
COMPRESS, EXTRACT = "mergekit-cart compress", "mergekit-extract-lora"


@dataclass(frozen=True)
class Case:
    """Models of which both commands make adapters.

    Attributes:
        title: in the table.
        base: the pretrained model's folder.
        tuned: the fine-tuned ones'.
        rank: of the adapters.
    """

    title: str
    base: Path
    tuned: Sequence[Path]
    rank: int


def find_cases(quick: bool) -> list[Case]:
    """Llama-shaped models of decaying and of flat spectra, and the text suite's encoders."""
    shape = llama(64, 2, 256) if quick else llama(1024, 8)
    found = []
    rank = 4 if quick else 40
    for title, noise in (("decaying spectra", 0.0), ("noise", 1.0)):
        models = Models(shape, noise=noise)
        models.write(models.tuned)
        base, *tuned = models.paths()
        found.append(Case(f"4 Llamas, {title}, rank {rank}", base, tuned, rank))
    if not quick:
        found.append(_text_case())
    return found


def _text_case() -> Case:
    from benchmarks.text.backbone import prepare_backbone
    from benchmarks.text.finetune import FineTuning, finetune_all
    from benchmarks.text.tasks import SUITE

    folders = finetune_all(tuple(SUITE), 0, FineTuning())
    return Case(
        "8 MiniLMs of the text suite, rank 23", prepare_backbone(), list(folders.values()), 23
    )


def run(case: Case, command: str) -> dict[str, float]:
    """Run one of the commands for all models of a case; what it needed."""
    with tempfile.TemporaryDirectory() as work:
        if command == COMPRESS:
            names = ",".join(str(index) for index in range(len(case.tuned)))
            options = ["--rank", str(case.rank), "--names", names, "--out", f"{work}/served"]
            program = [sys.executable, "-m", "cart_plugin", "compress", *options]
            runs = [measure([*program, *case.tuned], Path(work) / "log.txt")]
        else:
            runs = [
                measure(
                    extract_command(model, case.base, Path(work) / str(index), case.rank),
                    Path(work) / "log.txt",
                )
                for index, model in enumerate(case.tuned)
            ]
    return _together(runs)


def _together(runs: Sequence[Measurement]) -> dict[str, float]:
    return {
        "wall": sum(one.wall for one in runs),
        "cpu": sum(one.cpu for one in runs),
        "peak": max(one.peak for one in runs),
    }


def markdown(record: Record) -> str:
    """A row a case and command; the ratios are to `compress`."""
    cases, machine = record.cases, record.conditions["machine"]
    rows = []
    titles = list(dict.fromkeys(key.partition(" | ")[0] for key in cases))
    for title in titles:
        found = {
            command: {
                key: statistics.median(one[key] for one in cases[f"{title} | {command}"])
                for key in ("wall", "cpu", "peak")
            }
            for command in (COMPRESS, EXTRACT)
        }
        for command, own in found.items():
            ratios = [f"{own[key] / found[COMPRESS][key]:.1f}" for key in own]
            needs = [f"{own['wall']:.1f}", f"{own['cpu']:.1f}", f"{own['peak'] / 2**20:.0f}"]
            rows.append([title, command, *needs, *ratios])
    heading = ["models", "command", "wall s", "CPU s", "peak MiB", "of wall", "of CPU", "of peak"]
    table = markdown_table(heading, rows, ["---", "---", *["---:"] * 6])
    runs = min(len(measured) for measured in cases.values())
    return (
        f"Whole commands, start-up included: medians of {runs}, in turns, on "
        f"{machine['processor']}, {machine['cores']} cores; Llamas of 1024 hidden and 8 layers in "
        "bf16, MiniLM in fp32. `mergekit-extract-lora` makes one adapter a "
        "run: times are added up, the largest peak counts. "
        f"{made_by('bench-compress', record.measured)}\n\n{table}\n"
    )


@click.command()
@runs_option(3)
@quick_option
@out_option("compression")
def main(runs: int, quick: bool, out: Path) -> None:
    """Measure both commands."""
    console = Console()
    record = Record(out / "speed.json", conditions(COMPRESSES, PACKAGES, quick=quick))
    cases = find_cases(quick)
    with progress(console) as bar:
        task = bar.add_task("measuring", total=runs * 2 * len(cases))
        for round_ in range(runs):
            for case in cases:
                # Each is the first in turn: the second finds the files in memory.
                for command in (COMPRESS, EXTRACT) if round_ % 2 else (EXTRACT, COMPRESS):
                    key = f"{case.title} | {command}"
                    bar.update(task, description=key)
                    known = record.cases.get(key, [])
                    if len(known) <= round_:
                        record.put(key, [*known, run(case, command)], adds=True)
                    bar.advance(task)
    publish(markdown(record), out / "speed.md", console)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.compression.speed")
