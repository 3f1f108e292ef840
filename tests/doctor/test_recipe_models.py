"""What doctor says about the models of a recipe: where they are and what is in them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import cart_plugin
from tests.doctor.conftest import Report
from tests.doctor.tiny import change_config, edit_weights, load_tensors


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


def to_pickle(folder: str, *, wrapped: bool = False, zipped: bool = True) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    held = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
    torch.save(held, file.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=zipped)
    file.unlink()


def merge(models: list[str], out: Path, *, lazy: bool = False) -> None:
    """Merge them with mergekit itself."""
    LoaderCache().loaders.clear()  # one for the process, and a command is a process
    config = {"merge_method": "cart", "models": [{"model": model} for model in models]}
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, lazy_unpickle=lazy
    )
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def test_pickles_that_are_wrapped(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder in own_llamas:
        to_pickle(folder, wrapped=True)
    problems = check(own_llamas).problems
    assert len(problems) == 3
    assert "pytorch_model.bin holds no tensors by name but 'state_dict', 'epoch'" in problems[0]
    assert "['state_dict']" in problems[0]
    with pytest.raises(KeyError, match="lm_head"):  # and so it is
        merge(own_llamas, tmp_path / "out")


def test_pickles_of_the_old_format(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    to_pickle(own_llamas[1], zipped=False)
    report = check(own_llamas)
    report.has_only_warning(
        f"model {own_llamas[1]}: pytorch_model.bin is in the format of torch before 1.6",
        "--lazy-unpickle",
        "do not pass that flag",
    )
    merge(own_llamas, tmp_path / "out")
    with pytest.raises(zipfile.BadZipFile):
        merge(own_llamas, tmp_path / "lazy", lazy=True)


def test_an_index_that_leaves_a_tensor_out(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder in own_llamas:
        listed = shard(folder)
        del listed["lm_head.weight"]
        file = Path(folder) / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": listed}))
    problems = check(own_llamas).problems
    assert len(problems) == 3
    assert "model.safetensors.index.json leaves out lm_head.weight" in problems[0]
    merge(own_llamas, tmp_path / "out")  # exit code 0, and no head
    assert "lm_head.weight" not in load_tensors(tmp_path / "out")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "spiece.model"])
def test_pointers_of_git_lfs(
    name: str, check: Callable[..., Report], own_llamas: list[str]
) -> None:
    (Path(own_llamas[1]) / name).write_text(LFS)
    report = check(own_llamas)
    report.has_only_problem(f"model {own_llamas[1]}: {name} is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("closed", ["config.json", "model.safetensors", ""])
def test_what_may_not_be_read(
    closed: str,
    check: Callable[..., Report],
    own_llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Path(own_llamas[1]) / closed
    real_open, real_stat = Path.open, os.stat

    def refuse() -> None:  # root may read everything
        raise PermissionError(13, "Permission denied", str(place))

    def open_(self: Path, *arguments: Any, **options: Any) -> Any:
        return refuse() if self == place else real_open(self, *arguments, **options)

    def stat(path: Any, **options: Any) -> Any:
        inside = not closed and isinstance(path, str | Path) and place in Path(path).parents
        return refuse() if inside else real_stat(path, **options)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "stat", stat)
    report = check(own_llamas)
    report.has_only_problem(f"model {own_llamas[1]}: {place} is not yours to read", "chmod")
    assert "check itself failed" not in report.text


def test_a_place_that_may_not_be_entered(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path: Any, **options: Any) -> Any:
        if str(path).startswith("/root-only"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    check([*llamas, "/root-only/model"]).has_only_problem("/root-only/model is not yours to read")


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
