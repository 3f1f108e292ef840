"""What `make bench-gpu` does where there is no GPU, and how it ends what takes too long."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from benchmarks.common import gpu
from benchmarks.gpu import run, small
from benchmarks.gpu.run import STAGES, Outcome, Stage
from benchmarks.solvers import suite
from benchmarks.solvers.contestants import CUDA_SOLVERS
from benchmarks.solvers.matrices import BF16, MatrixMaker, Reference
from benchmarks.speed import merges


@pytest.mark.parametrize("command", [run.main, small.main, suite.main, merges.main])
def test_without_a_gpu_nothing_is_measured(
    command: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--cuda", "--out", str(tmp_path)] if command in (suite.main, merges.main) else []
    done = CliRunner().invoke(command, options)  # type: ignore[arg-type]
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: no CUDA GPU here: torch ")
    assert list(tmp_path.iterdir()) == []


def test_results_have_the_cards_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert gpu.gpu_results().parts[-2:] == ("gpu", "nvidia-h100-80gb-hbm3")


def test_all_stages_together_take_less_than_eight_minutes() -> None:
    assert sum(stage.limit + run._GRACE for stage in STAGES) < 8 * 60


def test_a_stage_is_told_how_it_ended(tmp_path: Path) -> None:
    for code, verdict in ((0, "passed"), (3, "failed")):
        program = f"import os, sys; print(os.environ['CART_TEST_DEVICE']); sys.exit({code})"
        outcome = run.run(Stage("x", ["-c", program], 30), tmp_path / "log")
        assert (outcome.verdict, outcome.said) == (verdict, "cuda")
        assert outcome.is_good is (code == 0)


def test_what_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_GRACE", 0.2)
    # Both are deaf to what asks politely.
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = f"{deaf} time.sleep(60)"
    program = (
        f"{deaf} import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])"
        "; print(child.pid, flush=True); time.sleep(60)"
    )
    outcome = run.run(Stage("x", ["-c", program], 2), tmp_path / "log")
    assert outcome.verdict == "stopped at its limit"
    pid, until = int(outcome.said), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("stage", "verdict", "is_good"),
    [
        ("solvers", "stopped at its limit", True),
        ("tests of compress", "stopped at its limit", False),
        ("solvers", "failed", False),
    ],
)
def test_tests_have_to_end_and_measurements_count_as_far_as_they_come(
    stage: str, verdict: str, is_good: bool
) -> None:
    assert Outcome(stage, verdict, 1.0, "").is_good is is_good


def test_tests_that_stages_name_are_there() -> None:
    named = [it for stage in STAGES for it in stage.command if it.startswith("tests/")]
    assert len(named) > 5
    assert all((run.ROOT / name).exists() for name in named)


def test_merges_on_a_gpu_say_so_to_mergekit() -> None:
    cases = merges.cuda_cases(quick=False)
    assert all(case.options == ("--cuda",) for case in cases)
    assert {case.dtype for case in cases} == {None, "float32"}
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)


def test_full_svds_of_large_matrices_are_left_out_on_a_gpu() -> None:
    full = suite.FULL
    assert suite._too_slow(full, (1024, 4096), 80, is_cuda=True) is None
    assert "more than 2048 rows" in str(suite._too_slow(full, (4096, 4096), 80, is_cuda=True))
    assert suite._too_slow("exact", (8192, 8192), 600, is_cuda=True) is None


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_gpu_solvers_take_what_models_are_stored_in(shape: tuple[int, int]) -> None:
    maker = MatrixMaker(*shape)
    x = maker.make(f"power law 1{BF16}")
    assert x is not None
    assert x.dtype == torch.bfloat16
    reference = Reference(x, 8)
    for name, solver in CUDA_SOLVERS.items():
        found = solver(x, 8)
        assert reference.accuracy(found.u, found.s, found.vh).error < 0.1, name
