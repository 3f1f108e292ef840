"""What mergekit would merge into a wrong model without a word: our methods end the merge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.scripts import merge_raw_pytorch

from cart_plugin.errors import CartWarning
from tests.doctor.gpt2 import save_gpt2
from tests.doctor.tiny import load_tensors
from tests.mergekit.helpers import (
    QUERY,
    Tensors,
    edit,
    fails,
    invoke,
    is_average,
    is_cart,
    pickle,
)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three GPT-2 with a classifier and one bare."""
    folder = tmp_path_factory.mktemp("gpt2")
    tuned = [
        save_gpt2(folder / f"tuned-{seed}", "GPT2ForSequenceClassification", seed)
        for seed in range(3)
    ]
    return [*tuned, save_gpt2(folder / "bare", "GPT2Model", 3)]


def test_a_bare_base_ends_the_merge(classifiers: list[str], tmp_path: Path) -> None:
    *tuned, bare = classifiers
    fails(tmp_path, tuned, f"by the names of {bare}", "leave base_model out", base_model=bare)


def test_a_bare_model_among_the_others_ends_the_merge(
    classifiers: list[str], tmp_path: Path
) -> None:
    fails(tmp_path, classifiers, f"by the names of {classifiers[3]}", "save all models with one")


def test_without_the_bare_base_the_classifiers_are_merged(
    classifiers: list[str], merge: Callable[..., Tensors]
) -> None:
    tuned = classifiers[:3]
    merged = merge(tuned)
    inputs = [load_tensors(folder) for folder in tuned]
    assert is_cart(merged, inputs, "transformer.h.0.mlp.c_fc.weight", 2)
    assert is_cart(merged, inputs, "score.weight", 1)


@pytest.mark.parametrize("spelling", ["slash", "dots", "relative", "link"])
def test_one_folder_under_two_paths_ends_the_merge(
    spelling: str, own: list[str], llamas: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    base = own[0]
    os.symlink(base, tmp_path / "link")
    other = {
        "slash": f"{base}/",
        "dots": f"{own[1]}/../{Path(base).name}",
        "relative": f"./{os.path.relpath(base)}",
        "link": str(tmp_path / "link"),
    }[spelling]
    models = [other, *llamas[1:4]]
    fails(tmp_path, models, "are one folder: the base model counts twice", base_model=base)
    fails(tmp_path, [*models, base], "are one folder: one model counts twice")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_end_the_merge_whatever_the_recipes_dtype(
    dtype: torch.dtype, own: list[str], tmp_path: Path
) -> None:
    name = QUERY.format(1)
    edit(own[1], lambda tensors: tensors | {name: (tensors[name] * 99).to(dtype)})
    fails(tmp_path, own, f"model {own[1]} holds {dtype} weights ({name})", dtype="bfloat16")


def test_pickled_inputs_are_looked_at_too(
    classifiers: list[str], own: list[str], tmp_path: Path
) -> None:
    *tuned, bare = [
        pickle(shutil.copytree(folder, tmp_path / f"p{number}").as_posix())
        for number, folder in enumerate(classifiers)
    ]
    fails(tmp_path, tuned, f"by the names of {bare}", base_model=bare)
    name = QUERY.format(1)
    edit(own[1], lambda tensors: tensors | {name: (tensors[name] * 99).to(torch.int8)})
    quantised = f"model {own[1]}{{}} holds torch.int8 weights ({name})"
    fails(tmp_path, [pickle(folder) for folder in own], quantised.format(""), dtype="float32")
    files = [f"{folder}/pytorch_model.bin" for folder in own]
    done = invoke(merge_raw_pytorch.main, tmp_path, files, "--quiet", dtype="float32")
    assert done.exit_code == 1
    assert quantised.format("/pytorch_model.bin") in str(done.exception)


def test_masks_and_indices_do_not_end_a_merge(
    merge: Callable[..., Tensors], own: list[str]
) -> None:
    mask = torch.ones(1, 1, 8, 8).tril()
    for folder in own:
        extra = {
            "model.layers.0.self_attn.bias": mask.to(torch.uint8),
            "model.layers.1.self_attn.bias": mask.to(torch.bool),
            "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
        }
        edit(folder, lambda tensors, extra=extra: tensors | extra)
    inputs = [load_tensors(folder) for folder in own]
    assert is_cart(merge(own), inputs, QUERY.format(1), 2)


def test_the_one_model_without_a_weight_is_told(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weighted: list[Any] = [{"model": m, "parameters": {"weight": 0.4}} for m in llamas[1:4]]
    with pytest.warns(CartWarning, match=f"model {llamas[0]} has no `weight`.*counts 1.0"):
        merged = merge([llamas[0], *weighted])
    assert is_average(merged, inputs[:4], "model.norm.weight", [1.0, 0.4, 0.4, 0.4])


# Slices of one model


def sliced(models: list[str], *, first: bool = False, **recipe: Any) -> dict[str, Any]:
    """A recipe of two slices: of all models, and of one alone."""
    together = {"sources": [{"model": model, "layer_range": [1, 3]} for model in models]}
    alone = {"sources": [{"model": models[0], "layer_range": [3, 5]}]}
    slices = [alone, together] if first else [together, alone]
    return {"slices": slices, **recipe}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_slice_of_one_model_is_passed_through(
    first: bool,
    with_base: bool,
    merge: Callable[..., Tensors],
    llamas: list[str],
    inputs: list[Tensors],
) -> None:
    recipe = sliced(llamas[:3], first=first)
    if with_base:
        recipe["base_model"] = llamas[4]
        _, merged_slice = sorted(recipe["slices"], key=lambda entry: len(entry["sources"]))
        merged_slice["sources"].append({"model": llamas[4], "layer_range": [1, 3]})
    merged = merge(None, **recipe)
    alone, together = (0, 2) if first else (2, 0)
    for layer in (0, 1):
        kept_tensor = inputs[0][QUERY.format(3 + layer)]
        assert torch.equal(merged[QUERY.format(alone + layer)], kept_tensor)
        shifted = [
            {QUERY.format(together + layer): one[QUERY.format(1 + layer)]} for one in inputs[:3]
        ]
        assert is_cart(merged, shifted, QUERY.format(together + layer), 2)


def test_slices_of_one_model_alone_end_the_merge(
    merge: Callable[..., Tensors], llamas: list[str]
) -> None:
    slices = [{"sources": [{"model": llamas[i], "layer_range": [i, i + 1]}]} for i in range(3)]
    with pytest.raises(ValueError, match="cart needs at least two fine-tuned models"):
        merge(None, slices=slices)


def test_a_recipe_that_failed_does_not_excuse_the_next(llamas: list[str], tmp_path: Path) -> None:
    fails(tmp_path, llamas[:3], "rank_ratio", parameters={"rank_ratio": 7})
    fails(tmp_path, llamas[:1], "cart needs at least two fine-tuned models")


def test_a_copy_of_a_folder_is_a_model_of_its_own(
    merge: Callable[..., Tensors], llamas: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(llamas[0], tmp_path / "copy").as_posix()
    assert merge([copy, *llamas[:3]])
