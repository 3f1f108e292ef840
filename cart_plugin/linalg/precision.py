"""Full fp32 products, whatever the process has chosen for its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_before: list[object] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep products of fp32 tensors from being rounded to TF32 or bf16, and autocast out.

    CUDA does the former where a program allows it for speed, and so do CPUs with bf16 units after
    `torch.set_float32_matmul_precision("medium")`: it costs 3e-3 of accuracy. The switches are the
    process's, so their users are counted: mergekit works each GPU in a thread.
    """
    global _users, _before
    switches = _switches()
    with _lock:
        if _users == 0:
            _before = [getattr(owner, name) for owner, name, _ in switches]
            for owner, name, full in switches:
                setattr(owner, name, full)
        _users += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for (owner, name, _), value in zip(switches, _before, strict=True):
                    setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, object]]:
    """Owner, name and full value of each switch."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        # torch 2.9 renamed them, and refuses to read the old ones once the new are in use.
        owners = (backends.cuda.matmul, backends.mkldnn.matmul)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False)]
