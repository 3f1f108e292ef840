"""One adapter of full rank is what the merge of the whole models changes of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result

from cart_plugin import CartSettings
from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import (
    farthest,
    load,
    save_base,
    save_lora,
    save_loras,
    state,
    whole,
)
from tests.doctor.tiny import write_recipe
from tests.execution.conftest import in_this_process, merge
from tests.inspect.test_activations import save_gpt2

__all__ = ["in_this_process", "merge"]

METHODS: dict[str, tuple[dict[str, Any], CartSettings | None]] = {
    "auto": ({}, CartSettings(lambda_="auto")),
    "auto, three directions": ({"keep": 3}, CartSettings(lambda_="auto", rank=3)),
    "cart": ({"method": "cart"}, CartSettings()),
    "cart, lambda": (
        {"method": "cart", "lambda_": 1.7, "keep": 2},
        CartSettings(rank=2, lambda_=1.7),
    ),
    "cart, ratio": ({"method": "cart", "rank_ratio": 0.1}, CartSettings(rank_ratio=0.1)),
    "linear": ({"method": "linear"}, None),
}


@pytest.mark.parametrize("name", METHODS)
def test_of_three_adapters(name: str, base: Path, trio: list[Path], tmp_path: Path) -> None:
    options, settings = METHODS[name]
    report = merge_adapters(trio, tmp_path / "out", rank="full", **options)
    assert report.rank == 12
    expected = whole(base, trio, settings)
    assert farthest(state(base, tmp_path / "out"), expected) < 1e-6
    assert farthest(state(base), expected) > 0.02


@pytest.mark.parametrize("method", ["auto", "cart", "linear"])
def test_weights_are_those_of_models(
    method: Any, base: Path, trio: list[Path], tmp_path: Path
) -> None:
    weights = [2.0, 1.0, 0.5]
    merge_adapters(trio, tmp_path / "out", rank="full", method=method, weights=weights)
    settings = METHODS[method][1]
    assert farthest(state(base, tmp_path / "out"), whole(base, trio, settings, weights)) < 1e-6


@pytest.mark.parametrize("count", [2, 4, 5, 6])
def test_of_few_and_of_many(count: int, base: Path, tmp_path: Path) -> None:
    """Of five and more, whole models are merged by another form."""
    adapters = save_loras(tmp_path, base, [{"r": 2}] * count, target_modules=["q_proj"])
    for method in ("auto", "cart"):
        merge_adapters(adapters, tmp_path / method, rank="full", method=method)
        expected = whole(base, adapters, METHODS[method][1])
        assert farthest(state(base, tmp_path / method), expected) < 3e-6


def check_whole_merge(
    merge: Callable[..., Result], base: Path, adapters: list[Path], folder: Path
) -> None:
    """The project's own merge of the whole models is the base with the merged adapter."""
    recipe = write_recipe(
        folder / "r.yaml",
        [f"{base}+{adapter}" for adapter in adapters],
        merge_method="cart_auto",
        base_model=str(base),
    )
    done = merge(recipe, folder / "whole")
    assert done.exit_code == 0, done.output
    merge_adapters(adapters, folder / "out", rank="full")
    expected = load(folder / "whole").state_dict()
    assert farthest(state(base, folder / "out"), expected) < 1e-6


def test_of_the_projects_own_merge_of_whole_models(
    merge: Callable[..., Result], base: Path, trio: list[Path], tmp_path: Path
) -> None:
    check_whole_merge(merge, base, trio, tmp_path)


@pytest.mark.parametrize("count", [3, 6])
def test_of_models_that_store_their_inputs_first(
    count: int, merge: Callable[..., Result], tmp_path: Path
) -> None:
    base = save_gpt2(tmp_path)
    config = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    adapters = [save_lora(tmp_path / f"a{seed}", base, seed, **config) for seed in range(count)]
    check_whole_merge(merge, base, adapters, tmp_path)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("count", [3, 5])
def test_stacked_experts(count: int, tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen3-moe")
    adapters = save_loras(
        tmp_path, base, [{"r": 2}] * count, target_parameters=EXPERTS, target_modules=["q_proj"]
    )
    for method in ("auto", "cart"):
        merge_adapters(adapters, tmp_path / method, rank="full", method=method)
        expected = whole(base, adapters, METHODS[method][1])
        assert farthest(state(base, tmp_path / method), expected) < 3e-6


def test_experts_that_one_adapter_leaves_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen3-moe")
    configs = [{"target_parameters": EXPERTS}, {}, {"target_parameters": EXPERTS}]
    adapters = save_loras(tmp_path, base, configs)
    merge_adapters(adapters, tmp_path / "out", rank="full")
    expected = whole(base, adapters, METHODS["auto"][1])
    assert farthest(state(base, tmp_path / "out"), expected) < 1e-6


def test_convolutions(tmp_path: Path) -> None:
    kind = transformers.AutoModelForImageClassification
    sizes = {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3}
    torch.manual_seed(0)
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    target = ["downsampling_layer.1", "pwconv1"]
    adapters = save_loras(tmp_path, base, [{"r": 2}] * 3, target_modules=target, kind=kind)
    for method in ("auto", "cart"):
        merge_adapters(adapters, tmp_path / method, rank="full", method=method)
        expected = whole(base, adapters, METHODS[method][1], kind=kind)
        assert farthest(state(base, tmp_path / method, kind), expected) < 1e-6
