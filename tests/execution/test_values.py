"""Merged values against the formula in double precision, on architectures of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.options import MergeOptions

from benchmarks.architectures import cases
from cart_plugin.checkpoints import names
from cart_plugin.execution import layout, routes
from cart_plugin.execution.inputs import Inputs, read_inputs
from cart_plugin.merging.tensors import is_decomposed, matrix_shape
from tests.doctor.tiny import edit_weights, load_tensors, write_recipe
from tests.support import cart_formula, relative_error

RANK_RATIO, LAMBDA = 0.2, 1.5
NAMES = [
    "Qwen3",
    "GPT-2",
    "Flan-T5",
    "BERT, bare",
    "DINOv2, bare",
    "ConvNeXt classifier",
    "ResNet classifier",
    "CLIP",
    "HuBERT classifier",
    "DeepSeek-V3",
    "PaliGemma",
]


def states(name: str, folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    kind = getattr(transformers, cases.ARCHITECTURES[name].model)
    return [dict(kind.from_pretrained(folder).state_dict()) for folder in folders]


def inputs_of(folders: list[Path], method: str) -> Inputs:
    entries = [
        {"model": str(folder), "parameters": {"weight": float(weight)}}
        for folder, weight in zip(folders, (1, 2, 1), strict=True)
    ]
    recipe = {"merge_method": method, "models": entries}
    if method == "cart":
        recipe["parameters"] = {"rank_ratio": RANK_RATIO, "lambda": LAMBDA}
    return read_inputs(recipe)


def expected(name: str, tensors: list[torch.Tensor], method: str, table: bool) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        return torch.stack(tensors).amax(0)  # counters; tables are alike
    shape = tensors[0].shape
    k = 0
    if method == "cart" and not table and is_decomposed(name, shape):
        stack, m, n = matrix_shape(name, shape)
        tensors = [tensor.reshape(stack, m, n) for tensor in tensors]
        k = max(1, int(RANK_RATIO * min(m, n)))
    return cart_formula(tensors, k, scale=LAMBDA, weights=[1.0, 2.0, 1.0]).reshape(shape)


@pytest.mark.parametrize("method", ["linear", "cart"])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_formula(name: str, method: str, tmp_path: Path) -> None:
    folders = cases.save_models(tmp_path, cases.ARCHITECTURES[name], original=True)
    inputs = inputs_of(folders, method)
    options = MergeOptions(quiet=True)
    out = tmp_path / "out"
    choice = routes.choose(inputs, options)
    routes.ROUTES[choice.route](routes.Job.of(choice, inputs, out, options), options)
    if not (out / "config.json").exists():
        (out / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    tables = names.vocabulary_names(layout.donor_model(inputs))
    held = states(name, folders)
    (merged,) = states(name, [out])
    for tensor, found in merged.items():
        wanted = expected(tensor, [state[tensor] for state in held], method, tensor in tables)
        if found.is_floating_point() and bool(wanted.any()):
            assert relative_error(found, wanted) <= 1e-5, tensor
        else:
            assert bool((found == wanted).all()), tensor


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mixtral", "Qwen3-MoE"])
def test_both_routes_and_both_formats_give_the_same_values(name: str, tmp_path: Path) -> None:
    merged = []
    for original in (True, False):
        place = tmp_path / str(original)
        folders = cases.save_models(place, cases.ARCHITECTURES[name], original)
        inputs = inputs_of(folders, "cart")
        options = MergeOptions(quiet=True)
        for route in ("plan", "tensorwise"):
            if route == "plan" and routes.choose(inputs, options).route != "plan":
                continue  # DeepSeek-V3 as published: the plan loses its experts
            out = place / route
            job = routes.Job.of(routes.Choice(route, ""), inputs, out, options)
            routes.ROUTES[route](job, options)
            (out / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
            merged += states(name, [out])
    assert len(merged) >= 3
    for other in merged[1:]:
        assert all(torch.equal(other[tensor], found) for tensor, found in merged[0].items())


def test_gradients_over_layers_reach_both_routes(
    saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    folders = saved("llama")
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": folder, "parameters": {"weight": weight}}
            for folder, weight in zip(folders, ([0.0, 1.0], [1.0, 0.0], 1.0), strict=True)
        ],
    }
    inputs, options = read_inputs(recipe), MergeOptions(quiet=True)
    found = []
    for route in ("plan", "tensorwise"):
        job = routes.Job.of(routes.Choice(route, ""), inputs, tmp_path / route, options)
        routes.ROUTES[route](job, options)
        found.append(load_tensors(tmp_path / route))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("equal", [True, False])
def test_integers_are_kept_where_all_agree(
    equal: bool, merge: Callable[..., Any], tmp_path: Path
) -> None:
    """A table that differs has no mean; what is stored beside the weights may be one."""
    folders = cases.save_models(tmp_path, cases.ARCHITECTURES["ResNet classifier"], original=True)
    name = "resnet.embedder.embedder.normalization.num_batches_tracked"
    for seed, folder in enumerate(folders):
        table = torch.arange(3) + (0 if equal else seed)
        edit_weights(str(folder), lambda tensors, table=table: tensors.update({name: table}))
    done = merge(write_recipe(tmp_path / "r.yaml", list(map(str, folders))), tmp_path / "out")
    assert done.exit_code == (0 if equal else 1), done.output
    if not equal:
        assert f"tensor '{name}' holds integers that differ" in done.output.splitlines()[-1]
