"""Methods that mergekit has not, tuned, and merged to folders that `compare` judges.

Settings are chosen in memory, on the validation split of the first fine-tuning seed.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.cache import MANIFEST, new_folder, read_manifest, settings_hash, write_json
from benchmarks.common.data_free import DOGE, OF_TAUS, merged_by
from benchmarks.common.record import Record

Point = Mapping[str, float]
SCALE = "scaling_factor"  # of all that is added to the base, whatever the method
WEIGHTS = "model.safetensors"
BESIDE_MERGEKIT = tuple(name for name in (*OF_TAUS, DOGE) if name not in ("TIES", "DARE-TIES"))
# At most eight points a method, as in `benchmarks.common.comparison`; around their authors'.
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "SWUDI": {"rank_ratio": (0.35, 0.5, 0.65, 0.85), "time": (300, 1300)},
    "ACE": {"eps": (1e-6, 1e-5, 1e-4, 2e-4, 1e-3, 4e-2)},
    "DC-Merge": {"density": (1e-3, 1e-2), SCALE: (0.85, 1.0, 1.3, 1.6)},
    "SVC, task arithmetic": {"scale": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)},
    "SVC, TSV-M": {"scale": (0.7, 0.85, 1.0, 1.3, 1.5, 2.0)},
    DOGE: {"lamda": (0.05, 0.07, 0.1)},
}


def slug(method: str) -> str:
    """A method's name in rows and folders."""
    return method.lower().replace(", ", "-").replace(" ", "-")


def points(method: str) -> list[Point]:
    """The settings that a method may choose from; none are its authors'."""
    grid = GRIDS.get(method, {})
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tune(
    methods: Sequence[str],
    tuned: Mapping[str, Path],
    base: Path,
    judge: Callable[[Mapping[str, Tensor]], dict[str, float]],
    path: Path,
) -> tuple[dict[str, Point], list[dict[str, Any]]]:
    """Judge all settings of methods on a validation split; what is known is not done again.

    Args:
        methods: by name.
        tuned: folders of the first seed's models, by task.
        base: that of their base.
        judge: takes a merged model's weights; returns accuracies by task.
        path: of the record.

    Returns:
        The best settings by method, and a row for each of all settings.
    """
    conditions = {"models": _identity(list(tuned.values()), base)}
    record = Record(path, conditions)
    wanted = {
        method: [point for point in points(method) if _name(method, point) not in record.cases]
        for method in methods
        if len(points(method)) > 1
    }
    if any(wanted.values()):
        states, start = [_state(folder) for folder in tuned.values()], _state(base)
        for method, missing in wanted.items():
            for point in missing:
                record.put(_name(method, point), judge(_merged(method, states, start, point)))
    chosen: dict[str, Point] = {}
    rows = []
    for method in methods:
        best = -1.0
        for point in points(method):
            accuracy = record.cases.get(_name(method, point))
            if accuracy is None:  # nothing to choose
                chosen[method] = point
                continue
            mean = statistics.fmean(accuracy.values())
            name = slug(method)
            rows.append({"name": name, "method": name, "settings": point, "accuracy": accuracy})
            click.echo(f"validation: {100 * mean:.1f} {_name(method, point)}")
            if mean > best:
                best, chosen[method] = mean, point
    return chosen, rows


def merged_models(
    chosen: Mapping[str, Point], tuned: Sequence[Path], base: Path, folder: Path
) -> dict[str, Path]:
    """Folders of models merged by some methods, unless they are there; by method.

    Each has the files of its base (config, tokenizer) and its own weights, in fp32.

    Args:
        chosen: the methods' settings.
        tuned: folders of models with one weight file.
        base: that of their base.
        folder: where the merged models are kept.
    """
    identity = _identity(tuned, base)
    found = {
        method: folder / f"{slug(method)}-{settings_hash([method, dict(point), identity])}"
        for method, point in chosen.items()
    }
    missing = [method for method, path in found.items() if read_manifest(path) is None]
    if missing:
        states, start = [_state(path) for path in tuned], _state(base)
        for method in missing:
            with new_folder(found[method]) as target:
                for path in base.iterdir():
                    if path.is_file() and path.name not in (WEIGHTS, MANIFEST):
                        shutil.copy(path, target / path.name)
                merged = _merged(method, states, start, chosen[method])
                save_file(merged, target / WEIGHTS, metadata={"format": "pt"})
                write_json(target / MANIFEST, identity | {"method": method})
    return found


def _identity(tuned: Sequence[Path], base: Path) -> dict[str, Any]:
    models = [str(path) for path in tuned]
    return {"models": models, "base": str(base), "peers": peers.REVISION}


def _name(method: str, point: Point) -> str:
    return f"{slug(method)} {json.dumps(point)}"


def _state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def _merged(
    method: str, tuned: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], point: Point
) -> dict[str, Tensor]:
    """Merge whole models at a setting."""
    own = {name: value for name, value in point.items() if name != SCALE}
    merged = merged_by(method, tuned, base, **own)
    if SCALE in point:
        merged = {
            name: torch.lerp(base[name].float(), tensor, point[SCALE])
            if tensor.is_floating_point()
            else tensor
            for name, tensor in merged.items()
        }
    return merged
