"""Recipes for mergekit, run by the real `mergekit-yaml`, timed, and checked for lost tensors."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.measure import CommandError, measure
from benchmarks.common.record import MERGES, revisions

MERGED = "merged"  # subfolder of a finished merge that holds the model
SEED = 0  # for DARE's random masks


class MergeError(RuntimeError):
    """mergekit failed, or its output lacks tensors; the message says which."""


@dataclass(frozen=True)
class Candidate:
    """A merge method with one setting.

    Args:
        method: mergekit's name of it.
        setting: the setting in words, for tables.
        parameters: the recipe's `parameters`.
        model_parameters: the `parameters` of each model.
        needs_base: whether the recipe names the pretrained model as `base_model`.
    """

    method: str
    setting: str
    parameters: dict[str, Any] = field(default_factory=dict)
    model_parameters: dict[str, Any] = field(default_factory=dict)
    needs_base: bool = True

    def recipe(self, models: Sequence[Path], base: Path) -> dict[str, Any]:
        """The mergekit recipe, with absolute paths (a relative one can look like a hub name)."""
        own = {"parameters": dict(self.model_parameters)} if self.model_parameters else {}
        recipe: dict[str, Any] = {
            "models": [{"model": str(path.absolute()), **own} for path in models],
            "merge_method": self.method,
        }
        if self.needs_base:
            recipe["base_model"] = str(base.absolute())
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        return recipe | {"dtype": "float32"}


@dataclass(frozen=True)
class Merge:
    """A finished merge: its model folder, and mergekit's seconds and peak resident memory (MB)."""

    folder: Path
    seconds: float
    peak_mb: float
    tensors: int


def merge(
    candidate: Candidate, models: Sequence[Path], base: Path, *, fresh: bool = False
) -> Merge:
    """Run `mergekit-yaml` on the candidate's recipe, unless the cache holds the result.

    The cache knows a merge by its recipe (whose paths name settings and seeds of the inputs) and
    the version of mergekit and, for `cart` and `cart_auto`, the revisions of this plugin's core.

    Raises:
        MergeError: mergekit is not installed, failed, or lost tensors.
    """
    recipe = candidate.recipe(models, base)
    identity = {"recipe": recipe, "seed": SEED, "mergekit": importlib.metadata.version("mergekit")}
    if candidate.method.startswith("cart"):
        identity["revisions"] = revisions(MERGES)
    folder = cache_root() / "merges" / f"{candidate.method}-{settings_hash(identity)}"
    record = None if fresh else read_manifest(folder)
    if record is None:
        with new_folder(folder) as target:
            recipe_file = target / "recipe.yaml"
            recipe_file.write_text(yaml.safe_dump(recipe, sort_keys=False))
            seconds, peak_mb = run_mergekit(recipe_file, target / MERGED)
            tensors = check_whole(models, target / MERGED)
            record = {"seconds": seconds, "peak_mb": peak_mb, "tensors": tensors}
            write_json(target / MANIFEST, record)
    return Merge(folder / MERGED, record["seconds"], record["peak_mb"], record["tensors"])


def run_mergekit(recipe: Path, out: Path) -> tuple[float, float]:
    """Run the environment's `mergekit-yaml` on a recipe file; return (seconds, peak resident MB).

    Raises:
        MergeError: the command is missing, or failed (with its last line).
    """
    executable = Path(sys.executable).parent / "mergekit-yaml"
    if not executable.exists():
        raise MergeError(f"mergekit-yaml is not beside {sys.executable}: run `make venv`")
    command: list[str | Path] = [
        executable,
        recipe,
        out,
        "--quiet",
        "--no-copy-tokenizer",
        "--random-seed",
        str(SEED),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        needed = measure(command, recipe.with_name("mergekit.log"), environment)
    except CommandError as error:
        last = str(error).strip().splitlines()[-1]
        raise MergeError(f"mergekit-yaml failed: {last}") from error
    return needed.wall, needed.peak / 1e6


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a model folder's safetensors files."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as handle:
            names = list(handle.keys())
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    return shapes


def check_whole(models: Sequence[Path], merged: Path) -> int:
    """Check that the merged folder has every tensor that all inputs share; return their number.

    mergekit drops tensors silently, with exit code 0, where its idea of an architecture and the
    files disagree.

    Raises:
        MergeError: it names the number of missing or misshapen tensors, and one of them.
    """
    inputs = [tensor_shapes(model) for model in models]
    shared = {
        name: shape for name, shape in inputs[0].items() if all(name in other for other in inputs)
    }
    found = tensor_shapes(merged)
    if not shared:
        raise MergeError("the inputs share no tensor at all")
    lost = sorted(name for name in shared if name not in found)
    if lost:
        raise MergeError(
            f"the merged model lacks {len(lost)} of the {len(shared)} tensors that its inputs "
            f"share, for example {lost[0]}"
        )
    bent = sorted(name for name, shape in shared.items() if found[name] != shape)
    if bent:
        raise MergeError(f"{len(bent)} merged tensors changed their shape, for example {bent[0]}")
    return len(shared)
