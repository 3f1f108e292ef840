"""What `cart` says through mergekit where it has kept nearly all of the differences."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mergekit.merge_methods as methods
import pytest
import torch
from click.testing import CliRunner
from mergekit.scripts import merge_raw_pytorch

from cart_plugin.errors import CartWarning
from tests.doctor.tiny import write_recipe
from tests.mergekit.helpers import LAYERS, QUERY, QUIET, Tensors, edit, fails, put
from tests.support import random

SAID = "decomposed tensors kept at least 99%"
WHOLE = {"rank": 16}  # k_proj and v_proj have 16 rows, others 32


@pytest.fixture(autouse=True)
def all_warnings() -> Iterator[None]:
    """A warning that is not expected fails a test, and one that comes again is not hidden."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        yield


def tune(folder: str, base: Tensors, seed: int) -> None:
    """Make a model the base with adapters of rank 4 in all of its matrices."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in base.items():
            tensors[name] = tensor
            if tensor.ndim == 2:
                m, n = tensor.shape
                tensors[name] = tensor + 1e-2 * random(m, 4, seed=seed) @ random(4, n, seed=seed)
        return tensors

    edit(folder, change)


@pytest.fixture
def adapted(own: list[str], inputs: list[Tensors]) -> list[str]:
    """Three models with adapters of rank 4."""
    for seed, folder in enumerate(own):
        tune(folder, inputs[0], seed)
    return own


def test_a_merge_that_keeps_adapters_whole_says_so_once(
    merge: Callable[..., Tensors], adapted: list[str], llamas: list[str]
) -> None:
    with pytest.warns(CartWarning, match=SAID) as told:
        merge(adapted, parameters=WHOLE)
    (one,) = told
    assert str(one.message).startswith(f"{7 * LAYERS} of {7 * LAYERS} ")
    merge(adapted, parameters={"rank": 2})
    merge(adapted, merge_method="cart_auto")
    merge(adapted, base_model=llamas[0], parameters={**WHOLE, "center": "base"})


def test_a_recipe_that_failed_leaves_nothing_behind(
    merge: Callable[..., Tensors], adapted: list[str], llamas: list[str], tmp_path: Path
) -> None:
    broken = adapted[2]
    whole = (Path(broken) / "model.safetensors").read_bytes()
    put(broken, QUERY.format(3), torch.full((32, 32), torch.nan))
    fails(tmp_path, adapted, "NaN", parameters=WHOLE)  # half-way
    (Path(broken) / "model.safetensors").write_bytes(whole)
    merge(llamas[:3], parameters={"rank": 2})
    for _ in range(2):
        with pytest.warns(CartWarning, match=SAID) as told:
            merge(adapted, parameters=WHOLE)
        assert str(told[0].message).startswith(f"{7 * LAYERS} of {7 * LAYERS} ")
    # One tensor that is merged by itself afterwards is no recipe.
    methods.merge_tensors([random(16, 16, seed=i) for i in range(3)], "cart", parameters=WHOLE)


def test_tensors_that_mergekit_copies_are_not_waited_for(
    adapted: list[str], tmp_path: Path
) -> None:
    for seed, folder in enumerate(adapted):
        put(folder, "steps", torch.tensor([7]))
        if seed == 0:
            put(folder, "alone.weight", random(4, 4))
    recipe = write_recipe(
        tmp_path / "raw.yaml",
        [f"{folder}/model.safetensors" for folder in adapted],
        parameters=WHOLE,
    )
    options = ["--tensor-union", *QUIET[2:]]
    with pytest.warns(CartWarning, match=SAID) as told:
        done = CliRunner().invoke(
            merge_raw_pytorch.main, [str(recipe), str(tmp_path / "raw"), *options]
        )
    assert done.exit_code == 0, done.output
    assert len(told) == 1


def test_mergekits_python_interface() -> None:
    states = [
        {"a": random(8, 8, seed=seed), "b": random(8, seed=seed), "n": torch.tensor(1)}
        for seed in range(3)
    ]
    with pytest.warns(CartWarning, match=f"1 of 1 {SAID}"):
        methods.merge_state_dicts(states, "cart", parameters={"rank": 8})
    methods.merge_state_dicts(states, "cart", parameters={"rank": 2})


def test_threads_merge_what_one_has_planned() -> None:
    method: Any = methods.get("cart")
    names = [f"layer.{number}" for number in range(12)]
    method.validate_inputs(["a", "b", "c"], group_name="default.slices[0]")
    for name in names:
        method.validate_inputs(["a", "b", "c"], group_name=name)
    told: list[str] = []

    def work(mine: list[str]) -> None:
        for name in mine:
            tensors = [random(8, 8, seed=seed) for seed in range(3)]
            group = methods.TensorGroup.from_tensors(tensors, ids=["a", "b", "c"], name=name)
            try:
                method([group], parameters={"rank": 8})
            except CartWarning as said:
                told.append(str(said))

    threads = [threading.Thread(target=work, args=(names[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (text,) = told
    assert text.startswith("12 of 12 ")
