"""Methods that draw at random draw by tensor, so that it does not matter who merges it when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.distributed.conftest import SHARDS
from tests.doctor.tiny import load_tensors, write_recipe
from tests.mergekit.helpers import QUERY, digest

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


@pytest.fixture(params=["dare_ties", "della"])
def recipe(request: pytest.FixtureRequest, saved: Saved, tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "r.yaml",
        saved("llama"),
        merge_method=request.param,
        base_model=saved("llama")[0],
        parameters={"weight": 1.0, "density": 0.5, "epsilon": 0.1},
    )


def test_an_interruption_changes_nothing(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert merge(recipe, tmp_path / name, "--workers", 1, *SHARDS).exit_code == 0
    interrupted(recipe, tmp_path / "out")
    assert merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS).exit_code == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "out")


def test_another_seed_draws_otherwise(merge: Merge, recipe: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        options = ("--workers", 1, "--random-seed", seed)
        assert merge(recipe, tmp_path / f"{seed}", *options).exit_code == 0
    assert digest(tmp_path / "0") != digest(tmp_path / "1")


def test_two_tensors_draw_apart(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    base, other, _ = saved("llama")
    recipe = write_recipe(
        tmp_path / "r.yaml", [other], merge_method="dare_linear", base_model=base,
        parameters={"weight": 1.0, "density": 0.5},
    )  # fmt: skip
    assert merge(recipe, tmp_path / "out", "--workers", 1).exit_code == 0
    before, after = load_tensors(base), load_tensors(tmp_path / "out")
    dropped = [before[QUERY.format(n)] == after[QUERY.format(n)] for n in range(2)]
    assert 0.4 < dropped[0].float().mean() < 0.6
    assert 0.4 < (dropped[0] == dropped[1]).float().mean() < 0.6
