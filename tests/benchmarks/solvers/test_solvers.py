"""The solver benchmark: its references, its cases, and a run from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common.record import Record
from benchmarks.solvers import report as solvers_report
from benchmarks.solvers import suite as solvers
from benchmarks.solvers.matrices import REAL, SPECTRA, MatrixMaker, Reference

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_accuracy_is_that_of_the_dense_matrices(shape: tuple[int, int]) -> None:
    x = MatrixMaker(*shape).make("power law 0.5")
    assert x is not None
    k = 7
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    best = (u[:, :k] * s[:k]) @ vh[:k]
    generator = torch.Generator().manual_seed(1)
    candidate = [part + 0.01 * torch.randn(part.shape, generator=generator) for part in
                 (u[:, :k].float(), s[:k].float(), vh[:k].float())]  # fmt: skip
    dense = (candidate[0].double() * candidate[1].double()) @ candidate[2].double()

    accuracy = Reference(x, 12).accuracy(*candidate)

    assert accuracy.error == pytest.approx(float((dense - best).norm() / best.norm()), rel=1e-5)
    optimum = (x - best).square().sum()
    excess = float((x - dense).square().sum() / optimum - 1)
    assert accuracy.excess == pytest.approx(excess, rel=1e-4)


def test_the_reference_itself_is_accurate() -> None:
    x = MatrixMaker(50, 80).make("power law 1")
    assert x is not None
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    accuracy = Reference(x, 10).accuracy(u[:, :10], s[:10], vh[:10])
    assert accuracy.error < 1e-7
    assert abs(accuracy.excess) < 1e-12


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != REAL])
def test_matrices_are_the_same_each_time(spectrum: str) -> None:
    first, second = (MatrixMaker(24, 36).make(spectrum) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert first.shape == (24, 36)
    assert torch.isfinite(first).all()


def test_power_laws_have_their_singular_values() -> None:
    x = MatrixMaker(30, 20).make("power law 0.5")
    assert x is not None
    expected = torch.arange(1, 21) ** -0.5
    torch.testing.assert_close(torch.linalg.svdvals(x), expected, rtol=1e-5, atol=0)


def test_one_case_through_every_solver(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.json", {"threads": 1})
    solvers.measure_matrix((64, 96), "power law 1", [0.08, 0.32], record, quick=True)

    assert set(record.cases) == {"64x96 | power law 1 | 0.08", "64x96 | power law 1 | 0.32"}
    case = record.cases["64x96 | power law 1 | 0.08"]
    assert case["k"] == 5
    assert set(case["solvers"]) | set(case["omitted"]) == set(solvers.SOLVERS)
    for name in ("exact", "fast", "auto"):
        assert case["solvers"][name]["error"] <= 1e-3
        assert case["solvers"][name]["estimate"] is not None
    assert case["solvers"]["exact"]["error"] <= 1e-5
    assert case["solvers"][solvers.FULL]["error"] <= 1e-5
    assert json.loads(record.path.read_text())["cases"] == record.cases


def test_measured_cases_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Record(path, {"threads": 1})
    first.put("64x96 | flat | 0.08", {"known": True})
    again = Record(path, {"threads": 1})
    solvers.measure_matrix((64, 96), "flat", [0.08], again, quick=True)
    assert again.cases == {"64x96 | flat | 0.08": {"known": True}}


def test_cases_of_other_conditions_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Record(path, {"threads": 1}).put("a", 1)
    other = Record(path, {"threads": 2})
    assert other.cases == {}
    assert other.discarded is not None
    assert "threads" in other.discarded
    assert Record(path, {"threads": 1}, resume=False).cases == {}


def test_bars_say_where_they_are_missed() -> None:
    def case(spectrum: str, seconds: float, error: float) -> dict[str, object]:
        figures = {"error": error, "excess": 1e-6, "estimate": error}
        return {
            "shape": [768, 768],
            "spectrum": spectrum,
            "ratio": 0.08,
            "k": 61,
            "omitted": {},
            "solvers": {
                solvers.FULL: {"seconds": 1.0, "error": 1e-6, "excess": 0.0, "estimate": None},
                "fast": {"seconds": seconds, **figures},
            },
        }

    bars = solvers_report.bars([case("flat", 0.5, 1e-4), case("power law 1", 0.1, 1e-2)])

    verdicts = {bar.what: bar.verdict for bar in bars}
    assert verdicts["speed-up ≥ 8"] == "missed: flat"
    assert verdicts["error ≤ 0.001"] == "missed: power law 1"
    assert verdicts["excess ≤ 0.0001"] == "met"
    assert verdicts["estimate / error, 0.1 to 10"] == "met"


@pytest.mark.slow
def test_the_quick_benchmark_writes_its_results(tmp_path: Path) -> None:
    # One thread: on a busy machine, threads that wait for each other take minutes.
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    command = [sys.executable, "-m", "benchmarks.solvers", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | threads, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    cases = json.loads((tmp_path / "results.json").read_text())["cases"].values()
    assert len(cases) >= 3 * 2 * 4
    for case in cases:
        figures, where = case["solvers"], (case["shape"], case["spectrum"], case["ratio"])
        assert figures["exact"]["error"] <= 1e-5, where
        for name in ("fast", "auto"):
            assert figures[name]["error"] <= 1e-3, (name, where)
            assert figures[name]["excess"] <= 1e-4, (name, where)
            if figures[name]["error"] > 1e-5:  # below is rounding
                trust = solvers_report.trust(case, name)
                assert trust is not None
                assert 0.1 <= trust <= 10, (name, where)
    assert "### Bars" in (tmp_path / "table.md").read_text()
    assert "### Bars" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "time_error.png").stat().st_size > 10_000
