"""What weight files hold, from their headers alone: names, shapes, dtypes, places; no data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cart_plugin.checkpoints.dtypes import DTYPES
from cart_plugin.errors import CheckpointError, first_line

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
AGAIN = "copy or download the model again"
_LFS = b"version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor.

    Attributes:
        shape: of the tensor.
        dtype: None if torch has no name for it, as for packed ones.
        stored: the dtype's name in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored: str = ""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.elements * (self.dtype.itemsize if self.dtype is not None else 1)

    @property
    def is_floating(self) -> bool:
        """Whether its values can be averaged: 8-bit floats cannot, the core rejects them."""
        return self.dtype is not None and self.dtype.is_floating_point and self.dtype.itemsize > 1

    @property
    def is_float8(self) -> bool:
        """Whether it holds floats of 8 bits, which mean little without scales of their own."""
        return self.dtype is not None and self.dtype.is_floating_point and self.dtype.itemsize == 1


@dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor of a safetensors file: where it lies, too.

    Attributes:
        file: the file.
        start: its first byte.
    """

    file: Path
    start: int


def read_header(file: Path, who: str) -> dict[str, TensorInfo]:
    """The tensors of a weight file, in its own order.

    Args:
        file: safetensors, whose tensors come as `StoredTensor`, or a pickled state dict.
        who: whose file it is, for errors: "model math".

    Raises:
        CheckpointError: it is missing, not to be read, truncated, or something else.
    """
    try:
        if is_lfs_pointer(file):
            raise CheckpointError(
                f"{who}: {file.name} is a Git LFS pointer, which stands for the file in a clone",
                "run `git lfs pull` in the folder, or download the model (hf download)",
            )
        return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file, who)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{who}: {file.name} is missing", AGAIN) from None
    except OSError as error:
        raise unreadable(file, who, error) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{who}: {file.name} is not a whole safetensors file ({error})",
            "it was truncated or is still being written; copy or download it again",
        ) from None
    except Exception as error:  # whatever a foreign file makes of the unpickler
        raise CheckpointError(
            f"{who}: {file.name} cannot be read: {first_line(error)}",
            f"{AGAIN}, or save it as safetensors",
        ) from None


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves of a large one where Git LFS has not brought it.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def unreadable(file: Path, who: str, error: OSError) -> CheckpointError:
    """What the system says of a file that is there."""
    reason = error.strerror or first_line(error)
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{who}: {file} is not yours to read ({reason})",
            "change its permissions (chmod u+r; of a folder u+rx), or ask its owner",
        )
    return CheckpointError(f"{who}: {file} cannot be read ({reason})", AGAIN)


def _safetensors(file: Path) -> dict[str, TensorInfo]:
    with safe_open(file, framework="pt"):
        pass  # the library's own checks; it does not say where tensors lie
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    return {
        name: StoredTensor(
            shape=tuple(entry["shape"]),
            dtype=DTYPES.get(entry["dtype"]),
            stored=entry["dtype"],
            file=file,
            start=8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _pickled(file: Path, who: str) -> dict[str, TensorInfo]:
    # On the meta device nothing of the data is kept, and weights_only runs no code of the file.
    state_dict = torch.load(file, map_location="meta", weights_only=True)
    found = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype)
        for name, tensor in (state_dict.items() if isinstance(state_dict, dict) else ())
        if isinstance(tensor, torch.Tensor)
    }
    if not found:
        inside = ", ".join(map(repr, state_dict)) if isinstance(state_dict, dict) else "no mapping"
        raise CheckpointError(
            f"{who}: {file.name} holds no tensors by name but {inside or 'nothing'}; what mergekit "
            "loads is a plain state dict",
            "save what is inside: torch.save(torch.load(FILE)['state_dict'], FILE), or better as "
            "safetensors",
        )
    return found
