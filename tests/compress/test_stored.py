"""An adapter that was changed after `compress` is refused by `expand`, or read as PEFT reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cart_plugin import CartError
from cart_plugin.checkpoints.names import meta_model
from cart_plugin.checkpoints.reading import read_config
from cart_plugin.compress import compress, expand, load_task, tasks
from cart_plugin.compress.layers import Structure
from tests.compress.models import save_tasks

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


@pytest.fixture
def served(models: list[Path], tmp_path: Path) -> Path:
    compress(models, tmp_path / "served", rank=3)
    return tmp_path / "served"


def edit(served: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = served / "adapters" / "two" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(served: Path, tmp_path: Path) -> str:
    with pytest.raises(CartError) as caught:
        expand(served, "two", tmp_path / "full")
    assert not (tmp_path / "full").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"use_rslora": True}, "adapter_config.json has use_rslora: True"),
        ({"alpha_pattern": {"q_proj": 12}}, "adapter_config.json has alpha_pattern"),
        ({"target_modules": [Q_PROJ.removeprefix("base_model.model.")]}, "has no place"),
        ({"target_modules": "lm_head"}, "it lacks base_model.model.lm_head.lora_A.weight"),
        ({"target_modules": "("}, "adapter_config.json has target_modules: '('"),
        ({"target_parameters": 7}, "adapter_config.json has target_parameters: 7"),
        ({"modules_to_save": 7}, "adapter_config.json has modules_to_save: 7"),
        ({"layer_replication": [[0, 1]]}, "adapter_config.json has layer_replication"),
        ({"lora_alpha": float("nan")}, "has lora_alpha nan and r 3, which were equal"),
        ({"lora_alpha": 99}, "has lora_alpha 99 and r 3, which were equal"),
    ],
    ids=str,
)
def test_a_config_that_says_otherwise(
    values: dict[str, Any], part: str, served: Path, tmp_path: Path
) -> None:
    configure(served / "adapters" / "two" / "adapter_config.json", **values)
    message = refused(served, tmp_path)
    assert message.startswith("adapter two is not as it was written: ")
    assert part in message


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (f"{Q_PROJ}.lora_A.weight", None, f"it lacks {Q_PROJ}.lora_A.weight"),
        (f"{Q_PROJ}.lora_B.weight", None, f"it lacks {Q_PROJ}.lora_B.weight"),
        (NORM, None, f"it lacks {NORM}"),
        (f"{Q_PROJ}.lora_A.weight", lambda one: one[:2].clone(), "lora_B.weight is (32, 3)"),
        (f"{Q_PROJ}.lora_A.weight", lambda one: one[:, :5].clone(), "lora_A.weight is (3, 5)"),
        (f"{Q_PROJ}.lora_A.weight", lambda one: one[:0].clone(), "lora_A.weight is (0, 32)"),
        (f"{Q_PROJ}.lora_A.weight", lambda one: one.sum(), "lora_A.weight is ()"),
        (f"{Q_PROJ}.lora_A.weight", lambda one: one / 0, "NaN or infinite values"),
        (NORM, lambda one: one[:5].clone(), f"{NORM} is (5,)"),
        (NORM, lambda one: one.int(), f"{NORM} is (32,) of I32"),
        (NORM, lambda one: one * float("nan"), "32 NaN or infinite values"),
    ],
)
def test_tensors_that_are_not_as_they_were(
    name: str, change: Any, part: str, served: Path, tmp_path: Path
) -> None:
    def changed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        one = held.pop(name)
        return held if change is None else {**held, name: change(one)}

    edit(served, changed)
    assert part in refused(served, tmp_path)


def test_values_that_leave_the_range(served: Path, tmp_path: Path) -> None:
    edit(
        served,
        lambda held: {
            name: torch.full_like(tensor, 1e20) if "lora" in name else tensor
            for name, tensor in held.items()
        },
    )
    assert "with adapter two: the merged values leave the range" in refused(served, tmp_path)


def test_tensors_by_other_names(served: Path, tmp_path: Path) -> None:
    edit(served, lambda held: {**held, "base_model.model.foo.weight": torch.zeros(2)})
    assert "it holds base_model.model.foo.weight, for which" in refused(served, tmp_path)
    edit(served, lambda held: {f"x.{name}": tensor for name, tensor in held.items()})
    assert "it lacks" in refused(served, tmp_path)


def test_an_adapter_in_another_dtype_is_the_same_model(served: Path, tmp_path: Path) -> None:
    exact = load_task(served, "two")
    edit(served, lambda held: {name: tensor.half() for name, tensor in held.items()})
    expand(served, "two", tmp_path / "full")
    for name, tensor in load_task(served, "two").items():
        assert tensor.dtype == exact[name].dtype
        assert torch.allclose(tensor, exact[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "entries",
    [["two"], {"two": None}, {"two": {"absent_files": 5}}, {"../adapters/two": {}}],
    ids=str,
)
def test_a_report_that_is_none(entries: Any, served: Path) -> None:
    configure(served / "report.json", tasks=entries)
    with pytest.raises(CartError, match="is no folder that `mergekit-cart compress` has written"):
        tasks(served)


def test_a_base_whose_config_has_no_dtype(served: Path, tmp_path: Path) -> None:
    config = json.loads((served / "base" / "config.json").read_text())
    del config["dtype"]
    (served / "base" / "config.json").write_text(json.dumps(config))
    shutil.copy(served / "base" / "config.json", served / "adapters" / "two" / "task_config.json")
    expand(served, "two", tmp_path / "full")
    assert "dtype" not in json.loads((tmp_path / "full" / "config.json").read_text())


def test_masks_that_models_compute_may_be_infinite(models: list[Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.masked_bias"
    for folder in models:
        index = folder / "model.safetensors.index.json"
        found = json.loads(index.read_text())
        found["weight_map"][name] = "masks.safetensors"
        index.write_text(json.dumps(found))
        save_file({name: torch.tensor(float("-inf"))}, folder / "masks.safetensors")
    compress(models, tmp_path / "out", rank=2)
    assert load_task(tmp_path / "out", "two")[name] == float("-inf")


def test_a_stack_of_one_is_read_as_it_was_written(tmp_path: Path) -> None:
    """As LoRA, which `compress` gives to no such stack any more."""
    models = save_tasks(tmp_path, "qwen3-moe", num_experts=1, num_experts_per_tok=1)
    report = compress(models, tmp_path / "out", rank=2)
    name = next(name for name in report.entries if name.endswith("experts.down_proj"))
    assert report.entries[name].kind == "exact"
    structure = Structure(meta_model(models[0], read_config(models[0], "one"), "one"), [])
    assert structure.layer(name) is None
    found = structure.by_class(name)
    assert found is not None
    assert found.kind == "experts"
