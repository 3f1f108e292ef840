"""The other commands of mergekit, and its executables as separate processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts import legacy, merge_raw_pytorch, multimerge
from safetensors.torch import save_file

from cart_plugin.linalg.krylov import leading_subspace
from tests.doctor.tiny import load_tensors, save_models, write_recipe
from tests.mergekit.helpers import (
    QUERY,
    QUIET,
    Tensors,
    digest,
    edit,
    execute,
    invoke,
    is_average,
    is_cart,
    looks_finished,
    put,
    run,
)
from tests.support import cart_formula, power_law, random, relative_error, with_spectrum


def test_flat_files_are_merged_by_mergekit_pytorch(tmp_path: Path) -> None:
    files, inputs = [], []
    for seed in range(3):
        tensors = {
            "visual.transformer.resblocks.0.attn.in_proj_weight": random(24, 8, seed=seed),
            "visual.conv1.weight": random(8, 3, 4, 4, seed=seed + 10),
            "visual.positional_embedding": random(5, 8, seed=seed + 20),
            "num_batches_tracked": torch.tensor(4),
        }
        files.append(str(tmp_path / f"{seed}.safetensors"))
        inputs.append(tensors)
        save_file(tensors, files[-1])
    result = invoke(merge_raw_pytorch.main, tmp_path, files, parameters={"rank": 2})
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert merged.keys() == inputs[0].keys()
    assert is_cart(merged, inputs, "visual.transformer.resblocks.0.attn.in_proj_weight", 2)
    kernels = [tensors["visual.conv1.weight"].reshape(8, -1) for tensors in inputs]
    expected = cart_formula(kernels, 2).reshape(8, 3, 4, 4)
    assert relative_error(merged["visual.conv1.weight"], expected) <= 1e-5
    assert is_average(merged, inputs, "visual.positional_embedding")
    assert merged["num_batches_tracked"] == 4


def test_one_flat_file_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "one.safetensors")
    save_file({"fc.weight": random(4, 5)}, file)
    result = invoke(merge_raw_pytorch.main, tmp_path, [file])
    assert result.exit_code == 1
    assert "cart needs at least two fine-tuned models" in str(result.exception)


def test_legacy_command_merges(llamas: list[str], inputs: list[Tensors], tmp_path: Path) -> None:
    merges = [option for model in llamas[:3] for option in ("--merge", model)]
    weights = [option for weight in ("1", "2", "3") for option in ("--weight", weight)]
    out = tmp_path / "out"
    result = CliRunner().invoke(
        legacy.main, [str(out), *merges, *weights, "--method", "cart", *QUIET]
    )
    assert result.exit_code == 0, result.output
    assert is_cart(load_tensors(out), inputs[:3], QUERY.format(0), 2, weights=[1.0, 2.0, 3.0])


def test_multi_command_chains_merges(
    llamas: list[str], inputs: list[Tensors], tmp_path: Path
) -> None:
    first = {"name": "first", "merge_method": "cart", "models": [{"model": m} for m in llamas[:3]]}
    last = {
        "merge_method": "cart",
        "parameters": {"rank": 5},
        "models": [{"model": model} for model in ["first", *llamas[3:]]],
    }
    file = tmp_path / "multi.yaml"
    file.write_text(yaml.safe_dump_all([first, last]))
    out, between = tmp_path / "out", tmp_path / "between"
    arguments = [str(file), "--out-path", str(out), "--intermediate-dir", str(between)]
    result = CliRunner().invoke(multimerge.main, [*arguments, *QUIET])
    assert result.exit_code == 0, result.output
    merged = load_tensors(between / "first")
    assert is_cart(merged, inputs[:3], QUERY.format(0), 2)
    assert is_cart(load_tensors(out), [merged, *inputs[3:]], QUERY.format(0), 5)


@pytest.fixture
def krylov_recipe(tmp_path: Path) -> Path:
    """A recipe that is solved from a random start."""
    shape = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
    models = save_models(tmp_path, "llama", 3, **shape)
    for seed, model in enumerate(models):
        put(model, QUERY.format(0), with_spectrum(power_law(128, 1), 128, 128, seed=10 * seed))
    queries = torch.stack([load_tensors(model)[QUERY.format(0)] for model in models])
    assert leading_subspace(queries - queries.mean(0), 3, tolerance=5e-4, seed=0) is not None
    parameters = {"svd": "fast", "rank": 3}
    return write_recipe(tmp_path / "krylov.yaml", models, parameters=parameters)


def test_the_executable_gives_the_same_bytes_as_this_process_whatever_the_hash_seed(
    krylov_recipe: Path, tmp_path: Path
) -> None:
    run(krylov_recipe, tmp_path / "here")
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    arguments = ["mergekit-yaml", krylov_recipe, tmp_path / "there", "-j", "1", *QUIET]
    done = execute(*arguments, PYTHONHASHSEED=other)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "config.json").is_file()
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_the_executable_says_on_stderr_what_is_wrong(own: list[str], tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[QUERY.format(0)][0, 0] = math.nan

    edit(own[2], spoil)
    recipe = write_recipe(tmp_path / "recipe.yaml", own)
    done = execute("mergekit-yaml", recipe, tmp_path / "out", *QUIET)
    assert done.returncode == 1
    assert f"tensor '{QUERY.format(0)}' of {own[2]} holds 1 NaN" in done.stderr
    assert not looks_finished(tmp_path / "out")


def test_two_runs_in_one_process_give_the_same_bytes(krylov_recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(krylov_recipe, tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_the_seed_is_a_parameter_of_the_recipe(krylov_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(krylov_recipe.read_text())
    recipe["parameters"]["seed"] = 1
    run(krylov_recipe, tmp_path / "one")
    run(write_recipe(tmp_path / "other.yaml", [], **recipe), tmp_path / "two")
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["-j", "2"], ["--low-cpu-memory"], ["--async-write", "--write-threads", "2"]],
    ids=" ".join,
)
def test_the_executable_works_with_options(
    options: list[str], llamas: list[str], inputs: list[Tensors], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", llamas)
    done = execute("mergekit-yaml", recipe, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    merged = load_tensors(tmp_path / "out")
    assert is_cart(merged, inputs, QUERY.format(1), 2)


@pytest.mark.slow
def test_the_other_executables_merge(llamas: list[str], tmp_path: Path) -> None:
    files = [f"{model}/model.safetensors" for model in llamas[:3]]
    flat = write_recipe(tmp_path / "flat.yaml", files)
    multi = write_recipe(tmp_path / "multi.yaml", llamas[:3], name="merged")
    merges = [f"--merge={model}" for model in llamas[:3]]
    for arguments, out in (
        (["mergekit-pytorch", flat, tmp_path / "flat"], "flat"),
        (["mergekit-legacy", tmp_path / "legacy", *merges, "--method=cart"], "legacy"),
        (["mergekit-multi", multi, "--intermediate-dir", tmp_path / "multi"], "multi/merged"),
    ):
        done = execute(*arguments)
        assert done.returncode == 0, done.stderr
        assert load_tensors(tmp_path / out).keys() == load_tensors(llamas[0]).keys()
