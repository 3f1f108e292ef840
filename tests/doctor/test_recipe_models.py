"""What doctor says about the models of a recipe: where they are and what is in them."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cart_plugin
from tests.doctor.conftest import Report
from tests.doctor.tiny import change_config, edit_weights


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the hub may be asked; a test that really asked would fail without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


# Where the models are


def test_folder_that_does_not_exist(check: Callable[..., Report], llamas: list[str]) -> None:
    for missing in ("/no/such/model", "./model", "../model", "a/b/c", "model.safetensors"):
        report = check([*llamas[:2], missing])
        assert any(f"model {missing} does not exist" in problem for problem in report.problems)


def test_home_directory_is_not_expanded(check: Callable[..., Report], llamas: list[str]) -> None:
    check([*llamas, "~/model"]).has_only_problem("does not expand `~`", str(Path.home()))


def test_hub_ids_are_not_checked(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    report = check([*llamas, "org/name"])
    report.has_only_warning("org/name is not a local folder", "Not checked", "hf download org/name")


def test_hub_ids_do_not_work_offline(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check([*llamas, "org/name"])
    report.has_only_problem("org/name is not a local folder and HF_HUB_OFFLINE is set", "download")


@pytest.mark.parametrize(
    ("path", "warned"),
    [("models/a", True), ("a", True), ("./a", False), ("x/models/a", False)],
)
def test_relative_paths_that_look_like_hub_ids(
    path: str,
    warned: bool,
    check: Callable[..., Report],
    llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas[0], path)
    models = [path, *llamas[1:]]
    report = check(models)
    if warned:
        report.has_only_warning(
            f"{path} looks like a Hugging Face id", f"./{path}", "--no-write-model-card"
        )
    else:
        report.is_clean()

    # mergekit itself
    config = MergeConfiguration.model_validate(
        {"merge_method": "cart", "models": [{"model": model} for model in models]}
    )
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    if warned:
        with pytest.raises(Exception, match="offline mode"):
            run_merge(config, str(tmp_path / "out"), options)
    else:
        run_merge(config, str(tmp_path / "out"), options)


def test_relative_paths_are_fine_online(
    check: Callable[..., Report],
    llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas[0], "models/a")
    online(monkeypatch)
    check(["models/a", *llamas[1:]]).is_clean()


def test_other_packages_are_imported_from_public_modules() -> None:
    imported = [
        node.module
        for file in Path(cart_plugin.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    assert "huggingface_hub.utils" in imported
    assert [name for name in imported if "._" in name] == []


# What is in them


def test_folder_without_config(check: Callable[..., Report], own_llamas: list[str]) -> None:
    (Path(own_llamas[1]) / "config.json").unlink()
    check(own_llamas).has_only_problem(f"{own_llamas[1]} has no config.json", "mergekit-pytorch")


def test_config_that_is_broken(check: Callable[..., Report], own_llamas: list[str]) -> None:
    (Path(own_llamas[1]) / "config.json").write_text("{")
    check(own_llamas).has_only_problem("config.json cannot be read", "again")


def test_config_without_architecture(check: Callable[..., Report], own_llamas: list[str]) -> None:
    change_config(own_llamas[0], architectures=None)
    check(own_llamas).has_only_problem("does not name one architecture", '"architectures": [')


def test_folder_without_weights(check: Callable[..., Report], own_llamas: list[str]) -> None:
    (Path(own_llamas[2]) / "model.safetensors").unlink()
    check(own_llamas).has_only_problem("has no model.safetensors", "not its parent")


def test_truncated_weights(check: Callable[..., Report], own_llamas: list[str]) -> None:
    file = Path(own_llamas[2]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    report = check(own_llamas)
    report.has_only_problem("model.safetensors is not a whole safetensors file", "truncated")


def shard(folder: str) -> dict[str, str]:
    """Split a model's weights into two files with an index; the index."""
    path = Path(folder)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({name: tensors[name] for name in members}, path / part)
    index = {name: part for part, members in parts.items() for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_are_read_through_their_index(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    shard(own_llamas[0])
    check(own_llamas).is_clean()


def test_missing_shard(check: Callable[..., Report], own_llamas: list[str]) -> None:
    shard(own_llamas[0])
    (Path(own_llamas[0]) / "model-2.safetensors").unlink()
    check(own_llamas).has_only_problem("model-2.safetensors is missing", "again")


def test_index_that_lists_too_much(check: Callable[..., Report], own_llamas: list[str]) -> None:
    index = {**shard(own_llamas[0]), "more.weight": "model-1.safetensors"}
    file = Path(own_llamas[0]) / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    check(own_llamas).has_only_problem("lacks more.weight, which the index lists")


def test_pickled_weights_are_read_too(check: Callable[..., Report], own_llamas: list[str]) -> None:
    for folder in own_llamas:
        file = Path(folder) / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    report = check(own_llamas)
    report.is_clean()
    assert "35 decomposed" in report.text


def test_quantised_weights(check: Callable[..., Report], own_llamas: list[str]) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 100).to(torch.int8)

    edit_weights(own_llamas[1], quantise)
    check(own_llamas).has_only_problem("torch.int8 weights", "layers.0.mlp.up_proj", "dequantise")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_float8_weights(name: str, check: Callable[..., Report], own_llamas: list[str]) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_weights(own_llamas[1], narrow)
    check(own_llamas).has_only_problem(
        f"holds torch.float8_e4m3fn weights ({name}); float8 weights cannot be merged", "dequantise"
    )


def test_a_file_among_the_folders(check: Callable[..., Report], llamas: list[str]) -> None:
    file = Path(llamas[0]) / "config.json"
    check([*llamas[1:], str(file)]).has_only_problem("is a file", "name the folder")


# LoRA


@pytest.fixture
def adapters(llamas: list[str], tmp_path: Path) -> list[str]:
    """Three LoRA adapters of the first Llama model."""
    folders = [str(tmp_path / f"lora-{number}") for number in range(3)]
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(llamas[0])
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folders


def test_lora_inputs_are_checked_without_fusing_them(
    check: Callable[..., Report], llamas: list[str], adapters: list[str]
) -> None:
    report = check([f"{llamas[0]}+{adapter}" for adapter in adapters])
    report.is_clean()
    assert "3 inputs with LoRA: pass --lora-merge-cache FOLDER" in report.text
    assert "35 decomposed" in report.text


def test_adapter_that_is_missing(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check([*llamas[1:], f"{llamas[0]}+/no/such/adapter"])
    report.has_only_problem("adapter /no/such/adapter does not exist")


def test_adapter_that_is_no_adapter(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check([*llamas[1:], f"{llamas[0]}+{llamas[1]}"])
    report.has_only_problem("has no adapter_config.json", "PEFT")


def test_adapter_in_place_of_a_model(
    check: Callable[..., Report], llamas: list[str], adapters: list[str]
) -> None:
    report = check([*llamas, adapters[0]])
    report.has_only_problem("is a LoRA adapter without its model", f"BASE_MODEL+{adapters[0]}")


def test_lora_on_an_inferred_architecture(
    check: Callable[..., Report], saved: Callable[..., list[str]], adapters: list[str]
) -> None:
    models = saved("dinov2", original_format=False)
    report = check([*models[1:], f"{models[0]}+{adapters[0]}"])
    report.has_only_problem("cannot plan", "fuse the adapters first")
