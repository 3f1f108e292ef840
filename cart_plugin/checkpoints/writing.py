"""Safetensors files of a known layout, a tensor at a time, and the index of their shards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cart_plugin.checkpoints.dtypes import DTYPES, NAMES
from cart_plugin.checkpoints.files import write_json
from cart_plugin.checkpoints.reading import INDEX, as_bytes

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""

SHARD_BYTES = 5 * 10**9


def header(layout: Layout) -> bytes:
    """The first bytes of a safetensors file, up to the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in _ordered(layout):
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def data_bytes(layout: Layout) -> int:
    """Bytes of the tensors alone."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def file_bytes(layout: Layout) -> int:
    """Bytes of a file."""
    return len(header(layout)) + data_bytes(layout)


def as_safetensors_has_it(layout: Layout) -> Layout:
    """A layout in the order of safetensors' own files: a file of it has the same bytes."""
    return dict(sorted(layout.items(), key=lambda entry: (_RANKS[entry[1][0]], entry[0])))


# safetensors sorts by its own list of dtypes, from its end, and then by name.
_RANKS = {
    DTYPES[name]: rank
    for rank, name in enumerate(
        ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
    )
}


def _ordered(layout: Layout) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    # Wide dtypes first, so that every tensor is aligned.
    return sorted(layout.items(), key=lambda entry: -entry[1][0].itemsize)


class TensorFile:
    """A safetensors file, written a tensor at a time in any order; a context manager."""

    def __init__(self, path: Path, layout: Layout, *, anew: bool = True) -> None:
        """Start a file of which dtypes and shapes are known.

        Args:
            path: the file.
            layout: what it holds.
            anew: whether it is a new file; else one of this layout is there (`reserve`), in which
                some of the tensors are written.
        """
        self._layout = dict(layout)
        self._starts: dict[str, int] = {}
        head = header(layout)
        position = len(head)
        for name, (dtype, shape) in _ordered(layout):
            self._starts[name] = position
            position += math.prod(shape) * dtype.itemsize
        self._missing = set(layout) if anew else set()
        self._file = path.open("wb" if anew else "r+b")
        if anew:
            self._file.write(head)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its dtype and shape are those of the layout."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._layout[name], name
        self._file.seek(self._starts[name])
        self._file.write(as_bytes(tensor.contiguous()))
        self._missing.discard(name)

    def close(self) -> None:
        """Close the file, in which all tensors are."""
        self._file.close()
        assert not self._missing, self._missing

    def abandon(self) -> None:
        """Close the file, whatever is in it; again without effect."""
        with suppress(OSError):  # what could not be written, as on a full disk, is tried once more
            self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def reserve(path: Path, layout: Layout) -> None:
    """Make a file of a layout, in which nothing is written yet: zeros that take no room."""
    with path.open("wb") as file:
        file.write(header(layout))
        file.truncate(file_bytes(layout))


def restore_header(path: Path, layout: Layout) -> None:
    """Write the header of a file of a layout anew, if it is another one."""
    head = header(layout)
    with path.open("r+b") as file:
        if file.read(len(head)) != head:
            file.seek(0)
            file.write(head)


def shards(layout: Layout) -> dict[str, Layout]:
    """Files of at most 5 GB, in the layout's order, with the names that transformers gives them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(layout),
        get_storage_size=lambda entry: math.prod(entry[1]) * entry[0].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    return {
        file: {name: layout[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }


def write_index(folder: Path, files: Mapping[str, Layout]) -> None:
    """Write the index of several shards; of one there is none."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(data_bytes(layout) for layout in files.values())},
        "weight_map": {name: file for file, layout in files.items() for name in layout},
    }
    write_json(folder / INDEX, index, sort_keys=True)
