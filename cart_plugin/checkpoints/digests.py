"""Whether weights are those that something was made for: by some of their values, or by all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from torch import Tensor

from cart_plugin.checkpoints.headers import StoredTensor, unreadable
from cart_plugin.checkpoints.reading import Checkpoint, as_bytes

_PIECES = 16
_PIECE = 4096  # bytes: a page


def digest(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's weights: names, dtypes, shapes, and some of the values.

    Of each tensor 16 pages are read that lie evenly over it, its first and its last among them.
    That tells models apart, for training moves every tensor a little everywhere; it is no proof
    against a change of single numbers. How the tensors lie in files does not matter.

    Args:
        checkpoint: of safetensors.

    Returns:
        32 hexadecimal digits.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.tensors):
        stored = checkpoint.tensors[name]
        assert isinstance(stored, StoredTensor), name
        found.update(json.dumps([name, str(stored.dtype), list(stored.shape)]).encode())
        size = math.prod(stored.shape) * checkpoint.dtype(name).itemsize
        try:
            with stored.file.open("rb", buffering=0) as file:
                for start, length in _pieces(size):
                    file.seek(stored.start + start)
                    found.update(file.read(length))
        except OSError as error:
            raise unreadable(stored.file, checkpoint.name, error) from None
    return found.hexdigest()


def state(checkpoint: Checkpoint) -> str:
    """What changes whenever weights are written: their digest, and the files' sizes and times.

    For what is measured again if in doubt: an edit of single numbers leaves the digest as it is.

    Args:
        checkpoint: of safetensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    held = {info.file for info in checkpoint.tensors.values() if isinstance(info, StoredTensor)}
    try:
        files = [(file.name, file.stat()) for file in sorted(held)]
    except OSError as error:
        raise unreadable(checkpoint.path, checkpoint.name, error) from None
    times = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    return f"{digest(checkpoint)} {times}"


def file_digest(file: Path) -> str:
    """A digest of a file by 16 pages that lie evenly over it: 32 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb", buffering=0) as held:
        for start, length in _pieces(file.stat().st_size):
            held.seek(start)
            found.update(held.read(length))
    return found.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """A digest of all values of a tensor on the CPU: 64 hexadecimal digits.

    SHA-256, because processors have instructions for it: it is faster here than BLAKE2.
    """
    return hashlib.sha256(as_bytes(tensor.contiguous())).hexdigest()


def _pieces(size: int) -> list[tuple[int, int]]:
    if size <= _PIECES * _PIECE:
        return [(0, size)]
    step = (size - _PIECE) / (_PIECES - 1)
    return [(round(piece * step), _PIECE) for piece in range(_PIECES)]
