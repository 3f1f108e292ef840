"""What the import hook adds to the start of every Python: `make bench-startup`.

Two environments that differ in nothing but the plugin's start-up files run `python -c pass` in
turns. Each holds the packages of the environment that runs this benchmark.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.common.cache import write_json
from benchmarks.common.measure import RESULTS, Measurement, machine, run
from benchmarks.common.provenance import provenance

LIMIT_MS = 2.0
START_UP_FILES = ("zzz_cart_plugin.pth", "zzz_cart_plugin.start")


@click.command()
@click.option("--pairs", default=300, show_default=True, help="Runs of each environment.")
def main(pairs: int) -> None:
    """Measure the start-up cost; the exit code is 1 if it is 2 ms or more, or torch is loaded."""
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        without = _environment(Path(folder, "without"), start_up=False)
        with_hook = _environment(Path(folder, "with"), start_up=True)
        added = sorted(_modules(with_hook) - _modules(without))
        if "cart_plugin.autoload.hook" not in added:
            raise click.ClickException("the hook did not start: `make venv` installs it")
        before, after = _interleaved(without, with_hook, pairs)

    result: dict[str, Any] = {
        "machine": where,
        "measured": [provenance()],
        "pairs": pairs,
        "wall_ms": _summary([m.wall for m in before], [m.wall for m in after]),
        "cpu_ms": _summary([m.cpu for m in before], [m.cpu for m in after]),
        "modules_added": added,
        "torch_imported": "torch" in added,
        "limit_ms": LIMIT_MS,
    }
    write_json(RESULTS / "speed" / "startup.json", result)
    _show(result)
    # Judged by CPU time: a start waits for nothing; wall time counts other work too.
    if result["torch_imported"] or result["cpu_ms"]["added"] >= LIMIT_MS:
        sys.exit(1)


def _environment(folder: Path, start_up: bool) -> Path:
    """A virtual environment with links to all that is installed here; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if start_up or path.name not in START_UP_FILES:
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def _modules(python: Path) -> set[str]:
    program = "import sys; print(*sys.modules)"
    return set(subprocess.check_output([python, "-c", program], text=True).split())


def _interleaved(
    first: Path, second: Path, pairs: int
) -> tuple[list[Measurement], list[Measurement]]:
    """Run both in turns, changing who goes first, so that neither has the quieter machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    runs: dict[Path, list[Measurement]] = {first: [], second: []}
    for index in range(pairs + 5):
        for python in (first, second) if index % 2 else (second, first):
            measured = run([str(python), "-c", "pass"], os.devnull, environment)
            if index >= 5:  # the first ones fill the file system's caches
                runs[python].append(measured)
    return runs[first], runs[second]


def _summary(without: list[float], with_hook: list[float]) -> dict[str, float]:
    """Medians, and median and quartiles of the differences within pairs; milliseconds."""
    differences = [(b - a) * 1e3 for a, b in zip(without, with_hook, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return {
        "without": round(statistics.median(without) * 1e3, 3),
        "with": round(statistics.median(with_hook) * 1e3, 3),
        "added": round(middle, 3),
        "added_lower_quartile": round(low, 3),
        "added_upper_quartile": round(high, 3),
    }


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"python -c pass, {result['pairs']} pairs of runs, medians")
    for column in ("", "without", "with the hook", "added", "quartiles of the difference"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("wall", "cpu"):
        row = result[f"{name}_ms"]
        quartiles = f"{row['added_lower_quartile']:.2f} to {row['added_upper_quartile']:.2f} ms"
        figures = [f"{row[key]:.2f} ms" for key in ("without", "with", "added")]
        table.add_row(f"{name} time", *figures, quartiles)
    console = Console()
    console.print(table)
    console.print(f"torch imported: {'yes' if result['torch_imported'] else 'no'}")


if __name__ == "__main__":
    main()
