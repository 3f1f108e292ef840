"""What doctor says about the models of a recipe and the merge that mergekit plans for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import peft
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cart_plugin.cli import costs
from tests.cli.conftest import Report
from tests.cli.tiny import change_config, load_tensors, save_model, write_recipe


@pytest.fixture
def check(doctor: Callable[..., Report], tmp_path: Path) -> Callable[..., Report]:
    """Doctor on a recipe for models in the given folders."""

    def check(folders: list[str], *options: object, **recipe: Any) -> Report:
        return doctor(write_recipe(tmp_path / "cart.yaml", folders, **recipe), *options)

    return check


def edit_weights(folder: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model in place."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


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


# Whether they fit together


def test_shapes_that_differ(check: Callable[..., Report], tmp_path: Path) -> None:
    models = [
        str(save_model(tmp_path / f"{labels}", "bert-classifier", labels, num_labels=labels))
        for labels in (2, 3, 4)
    ]
    report = check(models)
    report.has_only_problem(
        "the shapes of 2 tensors differ", f"(3,) in {models[1]}", "leave heads of different sizes"
    )


def test_vocabularies_that_differ(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, vocab_size=70))
    report = check([*llamas[:2], other])
    report.has_only_problem("the shapes of 2 tensors differ", "tokenizer: {source: union}")
    check([*llamas[:2], other], tokenizer={"source": "union"}).is_clean()


def test_depths_that_differ(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, num_hidden_layers=2))
    report = check([*llamas[:2], other])
    report.has_only_problem("cannot plan", "same number of layers", "compare their config.json")


def test_architectures_that_differ(
    check: Callable[..., Report], llamas: list[str], saved: Callable[..., list[str]]
) -> None:
    report = check([*llamas[:2], saved("qwen2")[0]])
    report.has_only_problem("cannot plan", "one architecture")


def test_tensor_missing_in_one_model(check: Callable[..., Report], own_llamas: list[str]) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    report = check(own_llamas)
    report.has_only_problem(
        f"model {own_llamas[1]} lacks 1 tensor (model.layers.1.mlp.up_proj.weight) that others have"
    )


def test_optional_tensor_missing_in_one_model(
    check: Callable[..., Report], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    models = saved("dinov2", original_format=False)
    other = str(shutil.copytree(models[0], tmp_path / "other"))
    edit_weights(other, lambda tensors: tensors.pop("embeddings.mask_token"))
    report = check([*models[1:], other])
    report.has_only_warning(f"model {other} lacks 1 tensor (embeddings.mask_token)", "from those")


def test_tensors_that_only_one_model_has(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    check(own_llamas).has_only_warning("1 tensor of some of the models", "score.weight")


def test_buffers_of_old_checkpoints_are_no_loss(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder in own_llamas:
        edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    check(own_llamas).is_clean()


# Whether mergekit keeps all of them


@pytest.mark.parametrize(("architecture", "dropped"), [("vit", 32), ("dinov2", 16)])
def test_tensors_that_mergekit_would_drop(
    architecture: str,
    dropped: int,
    check: Callable[..., Report],
    saved: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    models = saved(architecture)
    report = check(models)
    total = len(load_tensors(models[0]))
    report.has_only_problem(
        f"would silently drop {dropped} of {total} tensors",
        "save_original_format=False",
        "mergekit-pytorch",
    )
    # and so it does
    config = {"merge_method": "cart", "models": [{"model": model} for model in models]}
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), options)
    assert len(load_tensors(tmp_path / "out")) == total - dropped

    check(saved(architecture, original_format=False)).is_clean()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_encoders_that_mergekit_cannot_merge_have_a_way_out(
    architecture: str, check: Callable[..., Report], saved: Callable[..., list[str]]
) -> None:
    models = saved(architecture)
    report = check(models)
    assert len(report.problems) == 1
    assert "with a head" in report.problems[0] or "with their head" in report.problems[0]
    assert "mergekit-pytorch" in report.problems[0]

    check(saved(f"{architecture}-classifier")).is_clean()
    files = [f"{model}/model.safetensors" for model in models]
    report = check(files)
    report.is_clean()
    assert "valid for mergekit-pytorch" in report.text
    assert "13 decomposed, 26 averaged" in report.text


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral"])
def test_experts_are_counted_as_mergekit_stacks_them(
    architecture: str,
    original_format: bool,
    check: Callable[..., Report],
    saved: Callable[..., list[str]],
) -> None:
    report = check(saved(architecture, original_format=original_format))
    report.is_clean()
    # per layer four attention matrices, the router, and two stacks of experts
    assert "14 decomposed" in report.text


def test_slices_do_not_lose_the_layers_they_leave_out(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    sources = [{"model": model, "layer_range": [1, 3]} for model in llamas]
    last = [{"model": model, "layer_range": [4, 5]} for model in llamas]
    report = check([], models=None, slices=[{"sources": sources}, {"sources": last}])
    report.is_clean()
    assert "30 tensors: 21 decomposed" in report.text


# mergekit-pytorch


def test_weight_files_with_different_tensors(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.pop("lm_head.weight"))
    report = check([f"{model}/model.safetensors" for model in own_llamas])
    report.has_only_problem("lacks 1 tensor (lm_head.weight)", "--tensor-intersection")


def test_folder_among_the_weight_files(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check([f"{llamas[0]}/model.safetensors", llamas[1], llamas[2]])
    assert len(report.problems) == 2
    assert f"write {llamas[1]}/model.safetensors" in report.problems[0]


# What the merge needs


def test_output_folder_that_is_not_empty(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    check(llamas, "--out", tmp_path / "new" / "merged").is_clean()
    report = check(llamas, "--out", llamas[0])
    report.has_only_warning("is not empty", "choose another folder")


def test_too_little_disk_space(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    check(llamas).has_only_problem("disk needed: 202 KB", "1 KB", "another file system")
    check(llamas, out_dtype="bfloat16").has_only_problem("disk needed: 101 KB")


def test_too_little_memory(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "available_memory", lambda: 10**6)
    check(llamas).has_only_warning("memory needed on the CPU: up to about 45", "--out-shard-size")
    monkeypatch.setattr(costs, "available_memory", lambda: None)
    check(llamas).is_clean()


def test_doctor_changes_no_file_and_writes_none(
    check: Callable[..., Report],
    own_llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    check(own_llamas)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = state()
    check(own_llamas)
    recipe = tmp_path / "cart.yaml"
    assert {path: time for path, time in state().items() if path != recipe} == {
        path: time for path, time in before.items() if path != recipe
    }


def test_weights_are_not_loaded(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tensor data was loaded")

    monkeypatch.setattr("mergekit.io.lazy_tensor_loader.LazyTensorLoader.get_tensor", fail)
    check(llamas).is_clean()
