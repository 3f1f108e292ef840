"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cart_plugin.checkpoints.folders import DTYPES, INDEX, as_bytes
from cart_plugin.errors import CartError

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""

SHARD_BYTES = 5 * 10**9
_MARK = ".mergekit-cart-unfinished"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(layout: Layout) -> bytes:
    """The first bytes of a safetensors file, up to the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in _ordered(layout):
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
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


def _ordered(layout: Layout) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    # Wide dtypes first, so that every tensor is aligned.
    return sorted(layout.items(), key=lambda entry: -entry[1][0].itemsize)


class TensorFile:
    """A safetensors file, written a tensor at a time in any order; a context manager."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Start a file of which dtypes and shapes are known."""
        self._layout = dict(layout)
        self._starts: dict[str, int] = {}
        head = header(layout)
        position = len(head)
        for name, (dtype, shape) in _ordered(layout):
            self._starts[name] = position
            position += math.prod(shape) * dtype.itemsize
        self._missing = set(layout)
        self._file = path.open("wb")
        self._file.write(head)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its dtype and shape are those of the layout."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._layout[name], name
        self._file.seek(self._starts[name])
        self._file.write(as_bytes(tensor.contiguous()))
        self._missing.discard(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._missing, self._missing


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
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if all goes well, and else is removed.

    What a killed run has left there is removed, too. The mark in it stays until it has its name: a
    run that is killed just then leaves a finished folder with an empty file that nobody reads.

    Raises:
        CartError: ``out`` exists, or cannot be replaced; another run is writing it, or the disk is
            full.
    """
    from filelock import FileLock, Timeout

    out = out.resolve()  # "." has no name, and a link is no folder to be replaced
    _check_way(out)
    place = out.parent
    folder = place / f".{out.name}.unfinished"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
            raise CartError(f"{folder} is in the way and not of this program; remove it")
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / _MARK, timeout=0)
        lock.acquire()
    except Timeout:
        raise CartError(f"another run is writing {out}; wait for it, or name another") from None
    except OSError as error:
        raise CartError(f"{place}: {error.strerror}") from None
    done = False
    try:
        for left in folder.iterdir():
            if left.name != _MARK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield folder
        if out.exists():
            out.rmdir()  # empty, as seen above: else this fails
        os.rename(folder, out)
        done = True
        with suppress(OSError):
            (out / _MARK).unlink()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise CartError(f"cannot write {out}: {reason}; nothing is left of it") from error
    finally:
        lock.release()
        if not done:
            shutil.rmtree(folder, ignore_errors=True)


def _check_way(out: Path) -> None:
    """Refuse a folder that cannot be replaced, before the work rather than after it.

    Raises:
        CartError: it holds something, or is a mount point, the current folder, or protected.
    """
    if not out.exists():
        return
    try:
        if not out.is_dir() or any(out.iterdir()):
            raise CartError(f"{out} exists; name a new folder, or remove it")
        if out.samefile("."):
            raise CartError(f"{out} is the current folder and cannot be replaced; name a new one")
        out.rmdir()
        out.mkdir()
    except OSError as error:
        raise CartError(
            f"{out} cannot be replaced ({error.strerror}); name a new folder, such as one inside it"
        ) from None


def check_space(place: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        CartError: fewer bytes are free.
    """
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CartError(
            f"{place.parent} has {free:,} bytes free and {needed:,} are needed; make room or name "
            "another folder"
        )
