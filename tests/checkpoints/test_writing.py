"""Safetensors files, written a tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cart_plugin.checkpoints.digests import tensor_digest
from cart_plugin.checkpoints.dtypes import DTYPES
from cart_plugin.checkpoints.writing import (
    Layout,
    TensorFile,
    as_safetensors_has_it,
    file_bytes,
    reserve,
)

TENSORS = {
    f'z{number % 5}.é"{number}': torch.arange(7.0 + number).to(dtype)
    for number, dtype in enumerate([*DTYPES.values(), *DTYPES.values()])
}
LAYOUT: Layout = {name: (it.dtype, tuple(it.shape)) for name, it in TENSORS.items()}


@pytest.fixture
def theirs(tmp_path: Path) -> bytes:
    """What safetensors writes."""
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    return (tmp_path / "theirs").read_bytes()


def test_the_bytes_are_those_of_safetensors(theirs: bytes, tmp_path: Path) -> None:
    with TensorFile(tmp_path / "ours", as_safetensors_has_it(LAYOUT)) as file:
        for name in reversed(TENSORS):
            file.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == theirs


def test_several_write_into_one_file(theirs: bytes, tmp_path: Path) -> None:
    layout = as_safetensors_has_it(LAYOUT)
    reserve(tmp_path / "ours", layout)
    assert (tmp_path / "ours").stat().st_size == file_bytes(layout) == len(theirs)
    names = list(TENSORS)
    for own in (names[::2], names[1::2]):
        with TensorFile(tmp_path / "ours", layout, anew=False) as file:
            for name in own:
                file.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == theirs


def test_what_is_reserved_and_not_written_is_zero(tmp_path: Path) -> None:
    reserve(tmp_path / "ours", as_safetensors_has_it({"a": (torch.float32, (3,))}))
    assert load_file(tmp_path / "ours")["a"].tolist() == [0, 0, 0]


def test_a_file_with_a_tensor_missing_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), TensorFile(tmp_path / "ours", LAYOUT) as file:
        file.write('z0.é"0', TENSORS['z0.é"0'])


def test_a_digest_is_of_all_values() -> None:
    tensor = torch.arange(100_000, dtype=torch.bfloat16)
    other = tensor.clone()
    other[70_001] = 1
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(other)
