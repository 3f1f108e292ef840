"""The benchmark of several workers, and the estimate."""

import json
import sys

import click
import pytest

from benchmarks.common.measure import RESULTS
from benchmarks.speed import estimate
from benchmarks.speed.distributed import cases, digest, floor, is_table, markdown, watch
from tests.doctor.tiny import save_models


def test_each_way_is_one_row_with_its_bytes_compared() -> None:
    names = list(cases(workers=2, cores=4))
    assert names == ["mergekit-yaml", "mergekit-yaml -j 2", "--workers 1", "--workers 2"]
    costs = {
        name: [{"wall": wall, "peak": 2e9} for wall in (12.0 / n, 10.0 / n, 11.0 / n)]
        for n, name in enumerate(names, 1)
    }
    result = {
        "machine": {"cores": 4, "processor": "Some CPU", "load_average": 0.1},
        "measured": [{"cart_plugin": "0.1.0", "commit": "abc", "date": "2026-01-01"}],
        "runs": 3,
        "cases": costs,
        "equal": {"--workers 1": True, "--workers 2": False},
        "floor": {"reading": 1.0, "writing": 0.5, "products": 6.0},
    }
    first, *lines = markdown(result).splitlines()
    assert "Floor: reading 1.0 s, writing 0.5 s, products 6.0 s" in first
    assert "| --workers 1 | 3.7 | 3.00 | 2,000 | equal |" in lines
    assert "| --workers 2 | 2.8 | 4.00 | 2,000 | DIFFERENT |" in lines


def test_memory_of_all_processes_counts_once(tmp_path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "held = bytearray(60_000_000)\n"
        "held[::1000] = b'x' * len(held[::1000])\n"
        "if len(sys.argv) < 2: subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
        "else: time.sleep(1)\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    cost = watch([sys.executable, str(file)], tmp_path / "log")
    assert cost.wall > 1
    assert 120e6 < cost.peak < 250e6


def test_a_command_that_fails_says_what_it_printed(tmp_path) -> None:
    with pytest.raises(click.ClickException, match="no such luck"):
        watch([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log")


def test_the_floor_is_of_the_models_that_are_merged(tmp_path) -> None:
    from pathlib import Path

    models = [Path(model) for model in save_models(tmp_path, "llama")]
    found = floor(models, tmp_path, workers=2)
    assert set(found) == {"reading", "writing", "products"}
    assert min(found.values()) > 0
    assert digest(models[0]) != digest(models[1])
    assert is_table("model.embed_tokens.weight")
    assert not is_table("model.layers.0.mlp.up_proj.weight")


def test_the_saved_estimate_is_that_of_the_solvers_figures() -> None:
    solvers = json.loads((RESULTS / "solvers" / "results.json").read_text())
    seconds = estimate.core_seconds(solvers["cases"], cores=2)
    table = estimate.rows(seconds)
    saved = (RESULTS / "speed" / "estimate.md").read_text()
    assert saved == estimate.markdown(seconds, table)
    assert [row[0] for row in table] == ["1", "4", "16"]
    one, _, sixteen = (float(row[1]) for row in table)
    assert one == pytest.approx(seconds / 64 / 60, abs=1)
    assert sixteen == pytest.approx(one / 16, abs=1)


def test_products_grow_with_entries_and_directions() -> None:
    case = {"ratio": 0.08, "shape": [4096, 4096], "solvers": {"fast": {"seconds": 1.0}}}
    twice = {**case, "solvers": {"fast": {"seconds": 2.0}}}
    once = estimate.core_seconds({"a": case}, cores=2)
    assert estimate.core_seconds({"a": case, "b": twice}, cores=2) == pytest.approx(2 * once)
    small = {**twice, "shape": [768, 768]}  # of another regime
    assert estimate.core_seconds({"a": case, "b": small}, cores=2) == once
