"""Models of the paper's size: their differences, the cases, the table, and a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress

from benchmarks.common.measure import CommandError, Measurement, TooLongError
from benchmarks.common.record import Record
from benchmarks.paper_size import report, suite
from benchmarks.paper_size.methods import METHODS, settings
from benchmarks.paper_size.models import KINDS, TINY, pool_config, shaped, tuned_state
from benchmarks.paper_size.spectra import load_curves, measured, positions, spectrum
from benchmarks.paper_size.suite import Case

REPOSITORY = Path(__file__).parents[3]
MACHINE = {"processor": "one", "cores": 2}


def test_matrices_have_the_spectrum_and_their_own_vectors() -> None:
    values = torch.linspace(3, 0.5, 24)
    generator = torch.Generator().manual_seed(0)
    one, other = (shaped((24, 96), values, generator) for _ in range(2))
    assert torch.allclose(torch.linalg.svdvals(one), values, atol=1e-5)
    # No vector keeps to a few places, and two matrices have nothing in common.
    assert one.abs().max() < 6 * one.square().mean().sqrt()
    assert (one * other).sum().abs() < 0.2 * one.norm() * other.norm()
    assert shaped((96, 24), values, generator).shape == (96, 24)


def test_curves_are_those_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.arange(1, 17.0).pow(-0.8)
    values /= values.norm()
    base = {"attention.weight": torch.randn(16, 16, generator=generator)}
    size = base["attention.weight"].norm() * 0.05
    tuned = [
        {"attention.weight": base["attention.weight"] + shaped((16, 16), values, generator) * size}
        for _ in range(3)
    ]
    curve = measured(base, tuned)["square"]
    assert curve["index"] == positions(16)
    assert curve["relative_norm"] == pytest.approx(0.05, rel=1e-3)
    assert torch.allclose(spectrum(curve, 16), values, atol=1e-3)
    doubled = spectrum(curve, 32)
    assert doubled.norm() == pytest.approx(1)
    # The same decay over twice as many directions.
    assert (doubled[15] / doubled[31]).item() == pytest.approx(
        (values[7] / values[15]).item(), rel=0.02
    )


@pytest.mark.parametrize("name", list(TINY))
def test_copies_differ_as_measured(name: str) -> None:
    kind = TINY[name]
    base = {name: value.clone() for name, value in kind.build(0).state_dict().items()}
    tuned = tuned_state(kind, base, 0)
    again, other = tuned_state(kind, base, 0), tuned_state(kind, base, 1)
    curves = load_curves(kind.suite)
    matrix = next(n for n, value in base.items() if n.endswith(("fc1.weight", "dense.weight")))
    tau = tuned[matrix] - base[matrix]
    shape = "square" if tau.shape[0] == tau.shape[1] else "wide"
    size = curves[shape]["relative_norm"] * base[matrix].norm()
    assert torch.allclose(
        torch.linalg.svdvals(tau) / size, spectrum(curves[shape], min(tau.shape)), atol=1e-3
    )
    for key, value in base.items():
        assert torch.equal(tuned[key], again[key])
        if value.is_floating_point():
            assert not torch.equal(tuned[key], value)
            assert not torch.equal(tuned[key], other[key])


def test_ranks_are_the_papers() -> None:
    assert settings("cart", "b32", 20)[1:] == [
        "method.rank_ratio=0.32",
        "method.scaling_factor=1.9",
    ]
    assert settings("cart", "b32", 3)[1] == "method.rank_ratio=0.08"
    assert settings("cart_auto", "b32", 20) == ["method=cart/auto"]


def _run(cases: list[Case], record: Record, limit: float = 60.0, runs: int = 1) -> None:
    with Progress(disable=True) as bar:
        suite.run_all(cases, TINY, record, runs, limit, bar)


def test_a_run_goes_on_and_records_why_a_method_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def fake(command: list[Any], *_: Any, limit: float, **__: Any) -> Measurement:
        method = next(word for word in command if str(word).startswith("method="))
        commands.append(method)
        if "wudi" in method and limit < 100:
            raise TooLongError("too long")
        if "iso_cts" in method:
            raise CommandError(
                "Traceback\nRuntimeError: no convergence\n\nSet HYDRA_FULL_ERROR=1\n"
            )
        return Measurement(2.0, 3.0, 10**9)

    monkeypatch.setenv("CART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suite, "measure", fake)
    path = tmp_path / "results.json"
    cases = [Case("b32", 3, method) for method in ("cart", "wudi", "iso_cts", "tsvm")]
    monkeypatch.setattr(
        suite, "lacking", lambda case, _: "needs memory" if case.method == "tsvm" else None
    )
    _run(cases, Record(path, {}))
    known = Record(path, {}).cases
    assert known["b32 | 3 | cart"]["runs"][0]["wall"] == 2.0
    assert "fusion_bench method=cart " in known["b32 | 3 | cart"]["command"]
    assert known["b32 | 3 | wudi"]["over"] == 60.0
    assert known["b32 | 3 | iso_cts"]["error"] == "RuntimeError: no convergence"
    assert known["b32 | 3 | tsvm"]["error"] == "needs memory"

    del commands[:]
    _run(cases, Record(path, {}))
    assert commands == ["method=isotropic_merging/iso_cts"]  # what failed may work by now
    del commands[:]
    record = Record(path, {})
    _run(cases[:2], record, limit=600.0, runs=2)
    assert commands == ["method=wudi/wudi", "method=cart", "method=wudi/wudi"]
    assert [len(record.cases[case.key]["runs"]) for case in cases[:2]] == [2, 2]
    monkeypatch.setattr(suite, "lacking", lambda *_: "needs memory")
    _run(cases[:1], record, runs=3)
    case = record.cases["b32 | 3 | cart"]
    assert (len(case["runs"]), case["error"]) == (2, "needs memory")


def test_a_merge_that_wants_too_much_memory_says_how_much_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(*_: Any, memory: int, **__: Any) -> Measurement:
        raise CommandError(f"exited with 1:\nRuntimeError: DefaultCPUAllocator: not {memory}")

    monkeypatch.setenv("CART_CACHE", str(tmp_path))
    monkeypatch.setattr(suite, "measure", fake)
    monkeypatch.setattr(suite, "_available_memory", lambda: 5 * 10**9)
    found = suite.run_case(Case("b32", 8, "ties"), TINY["b32"], tmp_path, 60)
    assert found["error"] == "out of memory: wants more than 5 GB"


def test_what_no_disk_holds_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CART_CACHE", str(tmp_path))
    monkeypatch.setattr(suite, "_lacks_disk", lambda _, count: "no disk" if count > 2 else None)
    monkeypatch.setattr(suite, "write_models", lambda *_: tmp_path)
    monkeypatch.setattr(suite, "run_case", lambda *_: {"runs": [{"wall": 1.0}]})
    record = Record(tmp_path / "results.json", {})
    _run([Case("b32", count, "average") for count in (2, 4)], record)
    assert record.cases["b32 | 4 | average"] == {"error": "no disk"}
    assert record.cases["b32 | 2 | average"]["runs"]


def test_only_what_holds_all_models_needs_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_available_memory", lambda: 8 * 10**9)
    assert suite.lacking(Case("l14", 20, "average"), KINDS["l14"]) is None
    reason = suite.lacking(Case("l14", 20, "cart"), KINDS["l14"])
    assert reason == "needs about 28 GB of memory, 8 are free"


def _case(wall: float, peak: float) -> dict[str, Any]:
    return {"runs": [{"wall": wall, "cpu": 2 * wall, "peak": peak * 1e9, "load_before": 0.1}]}


def test_bars_compare_with_the_peers(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.json", {"machine": MACHINE})
    found = {
        "tsvm": _case(100, 4),
        "iso_cts": _case(80, 4),
        "cart": _case(30, 4.4),
        "cart_auto": _case(44, 4),
        "wudi": {"over": 600.0},
        "iso_c": {"error": "out of memory"},
    }
    for method, case in found.items():
        record.put(f"b32 | 8 | {method}", case)
    text = report.markdown(record, KINDS)
    assert "### CLIP ViT-B/32, 8 models" in text
    assert "| **CART** | 30 | 0.30 | 60 | 4.4 |" in text
    assert "| WUDI | over 600 |" in text
    assert "| Iso-C | out of memory |" in text
    judged = report.bars(record, KINDS)
    assert "CART: time at most 0.5 of TSV-M's | 0.30 | met |" in judged
    assert "CART: peak at most 1 of TSV-M's | 1.10 | missed |" in judged
    assert "no hyperparameters: time at most 0.5 of Iso-CTS's | 0.55 | missed |" in judged
    record.put("b32 | 8 | iso_cts", {"error": "LinAlgError: no", "after": 70.0})
    text, judged = report.markdown(record, KINDS), report.bars(record, KINDS)
    assert "| Iso-CTS | fails after 70 s: LinAlgError: no |" in text
    assert "of Iso-CTS's | 0.43 of its time until it ended | met |" in judged
    assert "of Iso-CTS's | 0.63 of its time until it ended | not known |" in judged


def test_a_report_needs_no_machine_like_the_one_that_measured(tmp_path: Path) -> None:
    elsewhere = {"machine": MACHINE | {"processor": "of another kind"}}
    Record(tmp_path / "results.json", elsewhere).put("b32 | 8 | cart", _case(30, 4.4))
    out = ["--report", "--out", str(tmp_path)]
    assert CliRunner().invoke(suite.main, out).exit_code == 0
    text = (tmp_path / "table.md").read_text()
    assert "on of another kind" in text
    assert "| **CART** | 30 |" in text
    none = CliRunner().invoke(suite.main, ["--report", "--out", str(tmp_path / "none")])
    assert "run without --report first" in none.output


def test_pools_are_fusion_benchs_own(tmp_path: Path) -> None:
    clip = pool_config(TINY["b32"], tmp_path, 2)
    assert clip["models"] == {
        "_pretrained_": str(tmp_path / "base"),
        "task0": str(tmp_path / "task0"),
        "task1": str(tmp_path / "task1"),
    }
    texts = pool_config(TINY["roberta"], tmp_path, 1)
    assert texts["models"]["task0"]["add_pooling_layer"] is False


@pytest.mark.slow
def test_the_tiny_benchmark_measures_every_method(tmp_path: Path) -> None:
    pytest.importorskip("fusion_bench")
    environment = os.environ | {"CART_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.paper_size", "--tiny", "--counts", "3"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    cases = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert set(cases) == {f"{kind} | 3 | {method}" for kind in TINY for method in METHODS}
    failed = {key: case for key, case in cases.items() if "runs" not in case}
    assert not failed
    assert not (tmp_path / "cache" / "paper-size").exists()
