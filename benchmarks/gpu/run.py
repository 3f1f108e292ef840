"""All that is to be run on a CUDA GPU, in stages with a limit each: `make bench-gpu`.

What a stage has measured when its limit comes stays. The limits sum up to less than eight minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.common.cache import write_json
from benchmarks.common.gpu import card, gpu_results
from benchmarks.common.measure import machine
from benchmarks.common.provenance import ROOT, made_by, provenance
from benchmarks.common.tables import markdown_table

# Each test has a line: what a stage that is stopped has not said, its end cannot say.
_TESTS = (
    "-m",
    "pytest",
    "-v",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-n",
    "auto",
    "--dist",
    "worksteal",
)


@dataclass(frozen=True)
class Stage:
    """One thing to run.

    Attributes:
        name: in the summary and of its log.
        command: arguments for Python.
        limit: seconds; then it is ended.
    """

    name: str
    command: Sequence[str]
    limit: int


_COMPRESS = ("ranks", "ranks_by_size", "small", "loading", "writing")
STAGES = (
    Stage("tests of solvers and merging", [*_TESTS, "tests/linalg", "tests/merging"], 85),
    Stage("solvers", ["-m", "benchmarks.solvers", "--cuda"], 50),
    Stage("merges", ["-m", "benchmarks.speed.merges", "--cuda"], 165),
    Stage("small problems", ["-m", "benchmarks.gpu.small"], 20),
    Stage(
        "tests of compress", [*_TESTS, *(f"tests/compress/test_{it}.py" for it in _COMPRESS)], 70
    ),
    Stage("tests of FusionBench", [*_TESTS, "tests/fusion_bench"], 70),
)
_GRACE = 2.0  # seconds to write down what was measured


@dataclass(frozen=True)
class Outcome:
    """What came of a stage.

    Attributes:
        stage: its name.
        verdict: `passed`, `failed` or `stopped at its limit`.
        seconds: that it took.
        said: its last line.
    """

    stage: str
    verdict: str
    seconds: float
    said: str

    @property
    def is_good(self) -> bool:
        """Whether it ended well; of measurements those are of use that were made in time."""
        is_partial = not self.stage.startswith("tests") and self.verdict.startswith("stopped")
        return self.verdict == "passed" or is_partial


def run(stage: Stage, log: Path) -> Outcome:
    """Run a stage until it ends, or its limit does: then it and all that it has started."""
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CART_TEST_DEVICE": "cuda"},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=stage.limit)
            verdict = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            verdict = "stopped at its limit"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
        finally:
            with suppress(ProcessLookupError):  # nothing that it has started stays
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "")
    return Outcome(stage.name, verdict, round(time.monotonic() - begun, 1), said)


@click.command()
def main() -> None:
    """Run all stages on the first GPU; the exit code is 1 if one fails, or if there is no GPU."""
    name, out = card(), gpu_results()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in STAGES:
        click.echo(f"{stage.name} (at most {stage.limit} s)")
        outcome = run(stage, out / f"{stage.name.replace(' ', '_')}.log")
        outcomes.append(outcome)
        click.echo(f"  {outcome.verdict}, {outcome.seconds:g} s: {outcome.said}")
        _write(name, out, outcomes)
    click.echo(f"Saved to {out}")
    if not all(outcome.is_good for outcome in outcomes):
        sys.exit(1)


def _write(name: str, out: Path, outcomes: Sequence[Outcome]) -> None:
    result = {
        "gpu": name,
        "machine": machine(),
        "measured": [provenance()],
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    write_json(out / "summary.json", result)
    rows = [[it.stage, it.verdict, f"{it.seconds:g}", it.said] for it in outcomes]
    table = markdown_table(["stage", "verdict", "s", "last line"], rows)
    (out / "summary.md").write_text(
        f"{made_by('bench-gpu', [provenance()], f'on {name}')}\n\n{table}\n"
    )
