"""Recipes for mergekit, run by the real `mergekit-yaml`, and checked for lost tensors."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
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
    """A finished merge: its model folder, and how many tensors were found whole in it."""

    folder: Path
    tensors: int


def merge(
    candidate: Candidate,
    models: Sequence[Path],
    base: Path,
    *,
    fresh: bool = False,
    here: bool = False,
) -> Merge:
    """Run `mergekit-yaml` on the candidate's recipe, unless the cache holds the result.

    `here` runs the function behind that command in this process, which saves its start (6 s); the
    merged weights are the same.

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
            (call_mergekit if here else run_mergekit)(recipe_file, target / MERGED)
            record = {"tensors": check_whole(models, target / MERGED)}
            write_json(target / MANIFEST, record)
    return Merge(folder / MERGED, record["tensors"])


def run_mergekit(recipe: Path, out: Path) -> None:
    """Run the environment's `mergekit-yaml` on a recipe file.

    Raises:
        MergeError: the command is missing, or failed (with its last line).
    """
    executable = Path(sys.executable).parent / "mergekit-yaml"
    if not executable.exists():
        raise MergeError(f"mergekit-yaml is not beside {sys.executable}: run `make venv`")
    done = subprocess.run(
        [executable, *_arguments(recipe, out)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    recipe.with_name("mergekit.log").write_text(done.stdout)
    if done.returncode:
        told = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MergeError(f"mergekit-yaml failed: {told[-1]}")


def call_mergekit(recipe: Path, out: Path) -> None:
    """Call the function behind `mergekit-yaml`, with the same arguments, in this process.

    Raises:
        MergeError: it failed.
    """
    from mergekit.scripts.run_yaml import main

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns that it infers this architecture, at each merge
    try:
        main(_arguments(recipe, out), standalone_mode=False)
    except Exception as error:
        told = str(error).strip().splitlines() or [""]
        raise MergeError(f"mergekit failed: {type(error).__name__}: {told[-1]}") from error
    finally:
        logging.disable(before)


def _arguments(recipe: Path, out: Path) -> list[str]:
    own = ["--quiet", "--no-copy-tokenizer", "--random-seed", str(SEED)]
    return [str(recipe), str(out), *own]


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
