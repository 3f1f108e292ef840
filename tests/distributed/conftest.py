"""Merges that are made by workers, and ones that are interrupted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from cart_plugin.checkpoints.writing import TensorFile
from tests.doctor.tiny import change_config, edit_weights, save_models, write_recipe
from tests.execution.conftest import in_this_process, merge, saved

__all__ = ["in_this_process", "merge", "saved"]

SHARDS = ("--out-shard-size", "20K")  # a dozen of the tiny Llamas

# As the command has it: of the low priority that Ray gives them, workers stand still beside others.
os.environ.setdefault("RAY_worker_niceness", "0")

METHODS = {
    "linear": {"parameters": {"weight": 1.0}},
    "ties": {"parameters": {"weight": 1.0, "density": 0.5}},
    "slerp": {"parameters": {"t": 0.4}},
    "cart": {},
    "cart_auto": {},
}


def recipe_of(method: str, models: list[str], folder: Path) -> Path:
    """A recipe of a method of mergekit's or ours."""
    settings = dict(METHODS[method])
    if method in ("ties", "slerp"):
        settings["base_model"] = models[0]
    taken = models[:2] if method == "slerp" else models
    return write_recipe(folder / f"{method}.yaml", taken, merge_method=method, **settings)


@pytest.fixture
def recipe(saved: Callable[..., list[str]], tmp_path: Path) -> Path:
    """CART of three tiny Llamas."""
    return recipe_of("cart", saved("llama"), tmp_path)


@pytest.fixture(scope="session")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """As `saved`, in bf16."""
    made: dict[str, list[str]] = {}

    def halved(architecture: str) -> list[str]:
        if architecture not in made:
            made[architecture] = save_models(tmp_path_factory.mktemp("halved"), architecture)
            for model in made[architecture]:
                halve(model)
        return made[architecture]

    return halved


def halve(model: str) -> None:
    """Cast a model's weights to bf16."""

    def cast(held: dict[str, torch.Tensor]) -> None:
        held.update({name: tensor.bfloat16() for name, tensor in held.items()})

    edit_weights(model, cast)
    change_config(model, dtype="bfloat16")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a finished model."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    """What is there of a result called `out`."""
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


def records(folder: Path) -> list[Path]:
    """The records of the finished shards of an interrupted merge into `folder/out`."""
    return sorted(folder.glob(".out.unfinished/merge-*/records/*.json"))


def shards(folder: Path) -> dict[str, int]:
    """When each finished shard, of one part, was written, by its name."""
    model = records(folder)[0].parent.parent / "model"
    names = [path.name.removesuffix(".0.json") for path in records(folder)]
    return {name: (model / name).stat().st_mtime_ns for name in names}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, int]]:
    """Let the disk be full after so many tensors; 0 makes room again."""
    write, known = TensorFile.write, {"room": 0, "written": 0}

    def limited(self: TensorFile, name: str, tensor: torch.Tensor) -> None:
        known["written"] += 1
        if 0 < known["room"] < known["written"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(TensorFile, "write", limited)

    def fill(room: int) -> dict[str, int]:
        known.update(room=room, written=0)
        return known

    return fill


@pytest.fixture
def interrupted(
    merge: Callable[..., Result], full_disk: Callable[[int], dict[str, int]]
) -> Callable[..., Result]:
    """Merge until the disk is full, a third on the way, and make room."""

    def run(*arguments: object) -> Result:
        full_disk(16)
        done = merge(*arguments, "--workers", 1, *SHARDS)
        assert done.exit_code == 1, done.output
        full_disk(0)
        return done

    return run
