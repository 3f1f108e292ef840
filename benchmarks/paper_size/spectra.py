"""How fine-tuning's differences decay: `python -m benchmarks.paper_size.spectra`.

Measured on the encoders of the vision and the text suite (first seed), which are fine-tuned now if
they are not in the cache. The curves are kept with the results: models are made from them on
machines without those encoders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.common.cache import write_json
from benchmarks.common.commands import out_option
from benchmarks.common.measure import RESULTS
from benchmarks.common.provenance import provenance
from benchmarks.suites import load_encoders, task_order
from cart_plugin.merging.tensors import is_decomposed

FILE = RESULTS / "paper_size" / "spectra.json"
SUITES = ("vision", "text")
SHAPES = ("square", "wide")
_POINTS = 49  # of a curve, denser where it falls fast


def shape_of(matrix: Tensor) -> str:
    """Attention's matrices are square, a feed-forward network's are four times as wide as high."""
    return "square" if matrix.shape[0] == matrix.shape[1] else "wide"


def positions(rank: int) -> list[int]:
    """Which singular values of a spectrum a curve keeps, from 1 to all."""
    steps = torch.logspace(0, torch.log10(torch.tensor(float(rank))).item(), _POINTS)
    return sorted({int(step) for step in steps.round().clamp(1, rank)})


def measured(base: dict[str, Tensor], tuned: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Curves of a suite's differences, by shape.

    Returns:
        By shape: `matrices` (how many of each model), `rank`, `index` (1 to rank) and `value` (the
        median singular value there, of spectra of norm 1), `relative_norm` (median norm of a
        difference over that of its weight), and `cosine` (mean between two tasks' differences).
    """
    spectra: dict[str, list[Tensor]] = {}
    norms: dict[str, list[float]] = {}
    cosines: dict[str, list[float]] = {}
    for shape, start, taus in _matrices(base, tuned):
        flat = torch.stack([tau.flatten() for tau in taus])
        unit = flat / flat.norm(dim=1, keepdim=True)
        apart = (unit @ unit.T)[~torch.eye(len(taus), dtype=torch.bool)]
        cosines.setdefault(shape, []).append(apart.mean().item())
        for tau in taus:
            values = torch.linalg.svdvals(tau)
            spectra.setdefault(shape, []).append(values / values.norm())
            norms.setdefault(shape, []).append((tau.norm() / start.norm()).item())
    found = {}
    for shape, curves in spectra.items():
        middle = torch.stack(curves).median(dim=0).values
        index = positions(len(middle))
        found[shape] = {
            "matrices": len(curves) // len(tuned),
            "rank": len(middle),
            "index": index,
            "value": [float(f"{middle[one - 1].item():.4g}") for one in index],
            "relative_norm": round(torch.tensor(norms[shape]).median().item(), 5),
            "cosine": round(torch.tensor(cosines[shape]).mean().item(), 4),
        }
    return found


def _matrices(
    base: dict[str, Tensor], tuned: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    for name, start in base.items():
        if start.ndim == 2 and is_decomposed(name, start.shape):
            taus = [one[name] - start for one in tuned]
            if all(tau.any() for tau in taus):
                yield shape_of(start), start, taus


def spectrum(curve: dict[str, Any], rank: int) -> Tensor:
    """Singular values of another rank that decay as a curve: `(rank,)`, of norm 1.

    A value's place is its index over the rank, on logarithmic scales; the places before the
    curve's first have the first value.
    """
    import numpy as np

    known = np.log(np.array(curve["index"]) / curve["rank"])
    wanted = np.log(np.arange(1, rank + 1) / rank)
    values = torch.from_numpy(np.exp(np.interp(wanted, known, np.log(curve["value"])))).float()
    return values / values.norm()


def load_curves(suite: str, file: Path = FILE) -> dict[str, Any]:
    """The curves of a suite, by shape."""
    found: dict[str, Any] = json.loads(file.read_text())["suites"][suite]
    return found


@click.command()
@out_option("paper_size")
def main(out: Path) -> None:
    """Measure the suites' differences and write `spectra.json`."""
    suites = {}
    for suite in SUITES:
        encoders = load_encoders(suite, 0, "validation", 1, task_order(suite))
        suites[suite] = measured(encoders.base(), [dict(one) for one in encoders.tuned.values()])
        click.echo(f"{suite}: {json.dumps(suites[suite])}")
    write_json(out / FILE.name, {"measured": [provenance()], "seed": 0, "suites": suites})


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.paper_size.spectra")
