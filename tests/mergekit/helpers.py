"""Merges through mergekit, and what is expected of their output."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import run_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.doctor.tiny import load_tensors, write_recipe
from tests.support import cart_formula, random, relative_error

Tensors = dict[str, Tensor]

QUERY = "model.layers.{}.self_attn.q_proj.weight"
KEY = "model.layers.{}.self_attn.k_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
QUIET = ["--no-write-model-card", "--no-copy-tokenizer", "--quiet"]
HIDDEN, LAYERS = 32, 5


def matrices(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(20, 30, seed=seed, dtype=dtype) for seed in range(count)]


def edit(folder: str, change: Callable[[Tensors], Tensors | None]) -> None:
    """Change the tensors of a model in place, or replace them."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def put(folder: str, name: str, tensor: Tensor) -> None:
    """Put a tensor into a model, in place of another or beside the others."""
    edit(folder, lambda tensors: tensors | {name: tensor})


def pickle(folder: str) -> str:
    """Save a model's tensors as a pickle instead; its folder."""
    torch.save(load_tensors(folder), Path(folder) / "pytorch_model.bin")
    (Path(folder) / "model.safetensors").unlink()
    return folder


def run(recipe: Path, out: Path, **options: Any) -> Tensors:
    """Merge in this process as `mergekit-yaml` does; what the output holds."""
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    defaults = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
    run_merge(config, str(out), MergeOptions(**{**defaults, **options}))
    return load_tensors(out)


def invoke(command: Any, tmp_path: Path, models: list[str], *options: str, **recipe: Any) -> Result:
    """Run a command of mergekit on a recipe, into a folder `out`, in this process."""
    file = write_recipe(tmp_path / "recipe.yaml", models, **recipe)
    out = tmp_path / "out"
    return CliRunner().invoke(command, [str(file), str(out), *options])


def execute(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run an executable that was installed beside this Python."""
    name, *rest = map(str, arguments)
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    assert program is not None, f"{name} is not installed beside {sys.executable}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run([program, *rest], capture_output=True, text=True, env=environment)


def looks_finished(folder: Path) -> bool:
    """Whether somebody might take a folder for a merged model."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    index = [*folder.glob("*.index.json")]
    return (folder / "config.json").exists() or bool(weights and index) or len(weights) == 1


def fails(tmp_path: Path, models: list[str], *parts: str, **recipe: Any) -> None:
    """Assert that a recipe ends with exit code 1, a message, and nothing that looks whole."""
    result = invoke(run_yaml.main, tmp_path, models, *QUIET, **recipe)
    assert result.exit_code == 1
    for part in parts:
        assert part in str(result.exception)
    assert not looks_finished(tmp_path / "out")


def is_cart(merged: Tensors, inputs: list[Tensors], name: str, k: int, **parameters: Any) -> bool:
    """Whether a tensor is what the equation says."""
    base = parameters.pop("base", None)
    expected = cart_formula(
        [tensors[name] for tensors in inputs],
        k,
        base=None if base is None else base[name],
        **parameters,
    )
    tolerance = torch.finfo(merged[name].dtype).eps
    return relative_error(merged[name], expected) <= max(tolerance, 1e-5)


def is_average(
    merged: Tensors, inputs: list[Tensors], name: str, weights: list[float] | None = None
) -> bool:
    """Whether a tensor is the weighted mean of the inputs'."""
    return is_cart(merged, inputs, name, 0, weights=weights)


def digest(folder: Path) -> str:
    """One hash of the weight files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
