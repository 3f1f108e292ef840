"""Several workers on this machine, by Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from click.testing import CliRunner, Result
from mergekit.scripts import run_yaml

from cart_plugin.distributed import plan
from tests.distributed.conftest import METHODS, SHARDS, contents, left, recipe_of
from tests.distributed.test_bytes import byte_pairs, rows_by_token
from tests.doctor.tiny import edit_weights, save_models, write_recipe
from tests.execution.test_command import refuses
from tests.mergekit.helpers import digest

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[None]:
    """One Ray for all of this file, which the command finds started; that takes long."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.parametrize("method", METHODS)
def test_two_workers_give_mergekit_yamls_bytes(
    method: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = recipe_of(method, saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--workers", 2, *SHARDS)
    assert done.exit_code == 0, done.output
    theirs = CliRunner().invoke(run_yaml.main, [str(recipe), str(tmp_path / "theirs"), *SHARDS])
    assert theirs.exit_code == 0, theirs.output
    assert digest(tmp_path / "out") == digest(tmp_path / "theirs")
    assert left(tmp_path) == ["out"]


@pytest.mark.slow  # Ray starts for ten seconds
@pytest.mark.parametrize("architecture", ["llama", "vit"])
def test_two_workers_share_one_shard(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PIECE", 9000)
    recipe = write_recipe(tmp_path / "r.yaml", saved(architecture))
    assert merge(recipe, tmp_path / "plain" / "out").exit_code == 0
    assert merge(recipe, tmp_path / "out", "--workers", 2).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "plain" / "out")


def test_all_workers_go_by_one_tokenizer(merge: Merge, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "llama")
    for model, words in zip(models, ("abcdefgh", "abcdefghijkl", "ghijklmnopqrstu"), strict=True):
        byte_pairs(words).save_pretrained(model)
    recipe = write_recipe(tmp_path / "r.yaml", models, tokenizer={"source": "union"})
    for out, options in (("out", ["--workers", 2]), ("plain", [])):
        # A file for each tensor: the two tables are made by two workers.
        arguments = ("--force", "--out-shard-size", 1, *options)
        assert merge(recipe, tmp_path / out, *arguments).exit_code == 0
    ours, theirs = rows_by_token(tmp_path / "out"), rows_by_token(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[token], theirs[token]) for token in ours)


@pytest.mark.slow  # Ray starts for ten seconds
def test_random_methods_draw_alike_whoever_merges(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", saved("llama"), merge_method="dare_ties", base_model=saved("llama")[0],
        parameters={"weight": 1.0, "density": 0.5},
    )  # fmt: skip
    for workers in (1, 2):
        done = merge(recipe, tmp_path / str(workers), "--workers", workers, *SHARDS)
        assert done.exit_code == 0, done.output
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_what_a_worker_refuses_is_one_line_and_names_the_tensor(
    merge: Merge, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(models[1], lambda tensors: tensors[name].fill_(float("nan")))
    recipe = write_recipe(tmp_path / "r.yaml", models)
    done = merge(recipe, tmp_path / "out", "--workers", 2, "--force", *SHARDS)
    refuses(done, "cannot make model-000", name, "NaN")
    assert "out" not in left(tmp_path)


@pytest.mark.slow  # Ray starts for ten seconds
def test_what_workers_warn_of_is_told_once(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("llama"), parameters={"rank": 32})
    plain = merge(recipe, tmp_path / "plain")
    done = merge(recipe, tmp_path / "out", "--workers", 2, *SHARDS)
    warnings = [
        [line for line in said.output.splitlines() if line.startswith("warning: ")]
        for said in (plain, done)
    ]
    assert len(warnings[0]) == 1
    assert warnings[0] == warnings[1]
