"""The merge benchmark: its reports, and a run on tiny models from end to end."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.progress import Progress

from benchmarks.common.measure import RESULTS
from benchmarks.common.record import Record
from benchmarks.speed import merges as merge_speed
from benchmarks.speed import report as merge_report
from benchmarks.speed.merges import METHODS, Case, Method

REPOSITORY = Path(__file__).parents[3]


def _case(series: str, label: str, wall: float, peak: float = 1e9) -> dict[str, object]:
    run = {"wall": wall, "cpu": wall, "peak": peak, "load_before": 0.0}
    return {"series": series, "label": label, "size": {"models": 4}, "runs": [run]}


def test_exponents_leave_out_the_start() -> None:
    cases = {"start | tiny": _case("start", "tiny", 5.0)}
    for size in (512, 1024, 2048):
        wall = 5.0 + 2.0 * (size / 512) ** 3
        cases[f"hidden | {size}"] = _case("hidden", str(size), wall)
    sizes, walls, exponent = merge_report.growth(cases)["hidden"]
    assert sizes == [512, 1024, 2048]
    assert walls == [7.0, 21.0, 133.0]
    assert exponent == pytest.approx(3)


def test_bars_compare_cart_with_the_others() -> None:
    walls = {"ties": 30.0, "dare_ties": 16.0, "cart, auto": 15.0, "plain full SVD": 70.0}
    cases = {
        f"methods on Llama | {label}": _case("methods on Llama", label, wall)
        for label, wall in walls.items()
    }
    cases["start | tiny"] = _case("start", "tiny", 5.0)
    parts = {"reading": 1.0, "writing": 0.5, "products": 11.0, "decompositions": 20.0}
    cases[merge_report.FLOOR] = {**parts, "merging": 2.0, "cores": 2}
    text = merge_report.markdown(
        {"machine": {"processor": "one", "cores": 2}, "versions": {}, "quick": False}, [], cases
    )
    # 5 s to start, 1.5 s for all bytes and half of 11 s: no merge is faster than 12 s.
    assert "| Llama | wall at most 0.35 times that of ties | 0.50 | missed | 0.40 |" in text
    assert "| Llama | wall at most 0.8 times that of dare_ties | 0.94 | missed | 0.75 |" in text
    assert "| Llama | wall at most 0.2 times that of plain full SVD | 0.21 | missed | 0.17" in text
    assert "| Llama | peak at most 1 times that of ties | 1.00 | met |  |" in text


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[Method] = []

    @contextmanager
    def fake(method: Method, *_: object) -> Iterator[tuple[Path, dict[str, float]]]:
        if len(merges) == 3:
            raise KeyboardInterrupt
        merges.append(method)
        yield tmp_path, {"wall": 1.0, "cpu": 1.0, "peak": 1}

    monkeypatch.setattr(merge_speed, "merged", fake)
    names = ("linear", "ties")
    cases = [Case("methods", name, METHODS[name], (tmp_path,)) for name in names]
    path = tmp_path / "results.json"
    with Progress(disable=True) as bar:
        with pytest.raises(KeyboardInterrupt):
            merge_speed.run_all(cases, 2, Record(path, {}), bar)
        del merges[:]
        record = Record(path, {})
        merge_speed.run_all(cases, 2, record, bar)
    assert merges == [METHODS["ties"]]
    assert {key: len(case["runs"]) for key, case in record.cases.items()} == {
        "methods | linear": 2,
        "methods | ties": 2,
    }


@pytest.mark.slow
def test_the_quick_benchmark_writes_its_results(tmp_path: Path) -> None:
    environment = os.environ | {"CART_CACHE": str(tmp_path / "cache")}
    # One thread: on a busy machine, threads that wait for each other take minutes.
    environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    command = [sys.executable, "-m", "benchmarks.speed.merges", "--quick"]
    command += ["--no-growth", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    cases = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert {f"methods on Llama | {label}" for label in METHODS} <= set(cases)
    for label in ("cart, fast", "cart, auto"):
        assert cases[f"accuracy on Llama | {label}"]["relative_difference"] <= 1e-3
    assert "plain full SVD" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "merge_speed.png").stat().st_size > 5_000
    assert not (tmp_path / "cache" / "merge-speed").exists()


def test_the_saved_bars_are_those_of_the_saved_figures() -> None:
    folder = RESULTS / "speed" / "merge_bars"
    saved = json.loads((folder / "results.json").read_text())
    cases = saved["cases"]
    given = (saved["conditions"], saved["measured"], cases)
    assert merge_report.markdown(*given) == (folder / "table.md").read_text()
    assert {case["label"] for case in cases.values() if "label" in case} == {
        *merge_speed.BARS,
        "tiny",
    }
