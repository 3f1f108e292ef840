"""Full fp32 products on CUDA, whatever the process has chosen for its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_before: object = None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding the factors of products to TF32 (10 bits) meanwhile.

    The switch is the process's, so its users are counted: mergekit works each GPU in a thread.
    """
    global _users, _before
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and refuses to read the old name once the new one is in use.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    with _lock:
        if _users == 0:
            _before = getattr(matmul, name)
            setattr(matmul, name, full)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                setattr(matmul, name, _before)
