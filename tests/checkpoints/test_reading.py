"""The reader: headers, folders, shards and adapters, whole, broken or missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cart_plugin.checkpoints.headers import StoredTensor, read_header
from cart_plugin.checkpoints.reading import (
    CONFIG,
    MERGEKIT_ORDER,
    TRANSFORMERS_ORDER,
    Checkpoint,
    open_adapter,
    open_folder,
    read_config,
    read_weights,
)
from cart_plugin.errors import CheckpointError

TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.weight": torch.arange(4.0).bfloat16(),
    "steps": torch.arange(3),
    "mask": torch.ones(2, dtype=torch.bool),
    "empty": torch.empty(0, 3),
    "number": torch.tensor(7, dtype=torch.int32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one weight file."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def index(folder: Path, **shards: str) -> None:
    found = {name.replace("_", "."): file for name, file in shards.items()}
    text = json.dumps({"weight_map": found})
    (folder / "model.safetensors.index.json").write_text(text)


def test_tensors_are_read_as_they_were_saved(folder: Path) -> None:
    model = open_folder(folder, "one")
    assert list(model.tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(model.read(name), tensor), name
        assert model.dtype(name) == tensor.dtype
        assert model.tensors[name].shape == tuple(tensor.shape)
        assert model.tensors[name].bytes == tensor.nbytes
    assert model.layout["b.weight"] == (torch.float32, (2, 3))
    assert model.bytes == (folder / "model.safetensors").stat().st_size
    assert model.model_type == "llama"


def test_which_tensors_can_be_averaged(folder: Path) -> None:
    tensors = open_folder(folder, "one").tensors
    assert [name for name, info in tensors.items() if info.is_floating] == [
        *("a.weight", "b.weight", "empty"),
    ]
    save_file({"x": torch.ones(2).to(torch.float8_e5m2)}, folder / "narrow.safetensors")
    (narrow,) = read_header(folder / "narrow.safetensors", "model x").values()
    assert narrow.is_float8
    assert not narrow.is_floating


def test_packed_dtypes_have_a_name_only(folder: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.uint32)}, folder / "model.safetensors")
    (info,) = open_folder(folder, "one").tensors.values()
    assert (info.dtype, info.stored) == (None, "U32")


def test_pickled_weights_are_read_for_those_who_take_them(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3), "step": 5}, tmp_path / "pytorch_model.bin")
    model = Checkpoint("one", tmp_path)
    read_weights(model, MERGEKIT_ORDER)
    assert {name: info.shape for name, info in model.tensors.items()} == {"a": (2, 3)}
    assert not isinstance(model.tensors["a"], StoredTensor)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"\.bin files, which are not read"):
        open_folder(tmp_path, "one")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "pytorch_model.bin", "model one")
    assert not (tmp_path / "ran").exists()


def test_an_index_and_a_single_file_are_taken_in_the_readers_order(folder: Path) -> None:
    save_file({"c": torch.zeros(1)}, folder / "part.safetensors")
    index(folder, c="part.safetensors")
    orders = {TRANSFORMERS_ORDER: "model.safetensors", MERGEKIT_ORDER: "part.safetensors"}
    for order, taken in orders.items():
        model = Checkpoint("one", folder)
        read_weights(model, order)
        assert [file.name for file in model.files] == [taken]


def test_a_tensor_counts_in_the_shard_that_the_index_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for number in (1, 2):  # a stale copy in the other file
        tensors = {"a": torch.full((2,), float(number)), "b": torch.zeros(1)}
        save_file(tensors, folder / f"part-{number}.safetensors")
    index(folder, a="part-1.safetensors", b="part-2.safetensors")
    assert open_folder(folder, "one").read("a").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "no model.safetensors, nor its index"),
        ({"weight_map": {"a": "gone.safetensors"}}, "shard gone.safetensors is missing"),
        ({"weight_map": {"x": "part.safetensors"}}, "part.safetensors lacks x, which the index"),
        ({"weight_map": {"a": 1}}, "names no file for a: 1"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "cannot be read: ValueError: it is no JSON object"),
    ],
)
def test_broken_folders_in_one_line(folder: Path, content: object, fact: str) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, folder / "part.safetensors")
    if content is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder, "one")
    assert fact in caught.value.fact
    assert caught.value.advice
    assert str(caught.value) == f"{caught.value.fact}; {caught.value.advice}"
    assert "\n" not in str(caught.value)


def test_an_index_that_leaves_a_tensor_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({name: torch.zeros(1) for name in "abc"}, folder / "part.safetensors")
    index(folder, a="part.safetensors")
    with pytest.raises(
        CheckpointError, match=r"index\.json leaves out b and 1 more, which a shard"
    ):
        open_folder(folder, "one")


def test_an_index_may_leave_out_what_models_compute_anew(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    held = {
        "a": torch.zeros(1),
        "layers.0.rotary_emb.inv_freq": torch.ones(4),
        "embeddings.position_ids": torch.arange(4)[None],
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e9),
    }
    save_file(held, folder / "part.safetensors")
    index(folder, a="part.safetensors")
    assert list(open_folder(folder, "one").tensors) == ["a"]
    save_file({**held, "h.0.attn.c_proj.bias": torch.ones(4)}, folder / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"leaves out h\.0\.attn\.c_proj\.bias, which"):
        open_folder(folder, "one")


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"a": torch.ones(2)}, "epoch": 3}, [torch.ones(2)], {}, {"step": 5}],
)
def test_pickles_that_are_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds no tensors by name but"):
        read_header(tmp_path / "pytorch_model.bin", "model one")


def test_each_file_is_blamed_by_its_own_name(folder: Path) -> None:
    broken = {
        CONFIG: "{",
        "model.safetensors.index.json": "{",
        "pytorch_model.bin.index.json": "[1, 2",
        "pytorch_model.bin": "no pickle",
    }
    for name, content in broken.items():
        (folder / name).write_text(content)
        model = Checkpoint("one", folder)
        with pytest.raises(CheckpointError) as caught:
            read_config(folder, "model one") if name == CONFIG else read_weights(model, (name,))
        assert caught.value.fact.startswith(f"model one: {name} cannot be read"), name


def test_a_pointer_of_git_lfs_is_called_that(folder: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
        )
        with pytest.raises(CheckpointError) as caught:
            read_header(folder / name, "model one")
        assert f"model one: {name} is a Git LFS pointer" in caught.value.fact
        assert "git lfs pull" in caught.value.advice


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def closed(self: Path, *arguments: Any, **options: Any) -> Any:  # root may read everything
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder, "one")
    assert f"{folder / name} is not yours to read (Permission denied)" in caught.value.fact
    assert "chmod" in caught.value.advice


def test_a_file_that_was_cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    for kept in (0, 4, 50, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=r"is not a whole safetensors file .* truncated"):
            open_folder(folder, "one")
        save_file(TENSORS, file)


def test_adapters(folder: Path) -> None:
    save_file({"lora_A": torch.ones(1, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter math has no adapter_config\.json"):
        open_adapter(folder, "math")
    (folder / "adapter_config.json").write_text('{"r": 1}')
    adapter = open_adapter(folder, "math")
    assert adapter.config == {"r": 1}
    assert adapter.read("lora_A").shape == (1, 2)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter math: adapter_model\.safetensors is miss"):
        open_adapter(folder, "math")
