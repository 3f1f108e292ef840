"""The benchmark of several workers, and the estimate."""

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.common.measure import RESULTS
from benchmarks.speed import estimate
from benchmarks.speed.distributed import FLOOR, cases, digest, equal, markdown, watch
from benchmarks.speed.floor import _one, floor, is_table
from tests.doctor.tiny import save_models
from tests.support import random


def test_each_way_is_one_row_with_its_bytes_compared() -> None:
    ways = cases(workers=2, cores=4)
    assert list(ways) == [
        "linear", "mergekit-yaml", "mergekit-yaml -j", "--workers 1", "--workers 2",
    ]  # fmt: skip
    assert list(ways["mergekit-yaml -j"].options) == ["-j", "2"]
    found: dict[str, Any] = {
        name: {
            "digest": "one thread" if "-j" in case.options else "all threads",
            "runs": [{"wall": wall, "peak": 2e9} for wall in (12.0 / n, 10.0 / n, 11.0 / n)],
        }
        for n, (name, case) in enumerate(ways.items(), 1)
    }
    parts = {"reading": 1.0, "writing": 0.5, "products": 6.0}
    found[FLOOR] = {**parts, "decompositions": 10.0, "merging": 1.0}
    conditions = {
        "machine": {"cores": 4, "processor": "Some CPU"},
        "shape": {"hidden": 8, "layers": 2, "vocabulary": 32000},
        "workers": 2,
    }
    assert equal(found, 2) == {"--workers 1": True, "--workers 2": True}
    lines = markdown(conditions, [], found).splitlines()
    assert "| `--workers 1` | 2.8 | 2.00 | 2,000 | equal |" in lines
    assert "| `linear` | 11.0 |  | 2,000 |  |" in lines
    assert "| floor: these three | 4.5 |" in lines
    assert "| decompositions, with their products | 5.0 |" in lines
    found["--workers 2"]["digest"] = "others"
    assert "| `--workers 2` | 2.2 | 2.50 | 2,000 | DIFFERENT |" in markdown(conditions, [], found)


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


def test_the_floor_is_of_the_models_that_are_merged(tmp_path: Path) -> None:
    models = [Path(model) for model in save_models(tmp_path, "llama")]
    found = floor(models, tmp_path)
    # The tiny matrices are too small for `fast`, whose products these are.
    assert found.pop("products") == 0
    assert set(found) == {"reading", "writing", "decompositions", "merging"}
    assert min(found.values()) > 0
    assert digest(models[0]) != digest(models[1])
    assert is_table("model.embed_tokens.weight")
    assert not is_table("model.layers.0.mlp.up_proj.weight")
    assert not (tmp_path / "floor.safetensors").exists()


def test_products_are_a_part_of_what_decompositions_take() -> None:
    tensors = [random(520, 560, seed=seed) for seed in range(3)]
    found = _one(tensors, "a.weight")
    assert 0 < found["products"] < found["decompositions"]


def test_the_saved_table_is_that_of_the_saved_figures() -> None:
    saved = json.loads((RESULTS / "speed" / "distributed.json").read_text())
    given = (saved["conditions"], saved["measured"], saved["cases"])
    assert markdown(*given) == (RESULTS / "speed" / "distributed.md").read_text()


def test_the_saved_estimate_is_that_of_the_solvers_figures() -> None:
    solvers = json.loads((RESULTS / "solvers" / "results.json").read_text())
    seconds = estimate.core_seconds(solvers["cases"], solvers["conditions"]["threads"])
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
