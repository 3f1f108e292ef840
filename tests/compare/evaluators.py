"""Evaluators that the tests name on the command line; they run in child processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from safetensors import safe_open


def mean_sizes(model: str) -> dict[str, float]:
    """Mean absolute value of a model's matrices and of its vectors, from the file alone."""
    sums: dict[str, list[float]] = {"matrices": [], "vectors": []}
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                kind = "matrices" if tensor.ndim > 1 else "vectors"
                sums[kind].append(float(tensor.abs().mean()))
    found = {kind: sum(values) / len(values) for kind, values in sums.items()}
    return {**found, "matrices_stderr": 0.01}


def slow(model: str) -> dict[str, float]:
    """The same after telling that it has begun; waits long if told to."""
    started = Path(os.environ["STARTED"])
    started.write_text(started.read_text() + f"{model}\n" if started.exists() else f"{model}\n")
    if os.environ.get("WAIT") == "yes":
        time.sleep(60)
    return mean_sizes(model)


def raising(model: str) -> dict[str, float]:
    """Fails for merged models."""
    if model.endswith("/model"):
        raise RuntimeError("out of patience\nsecond line")
    return mean_sizes(model)


def nothing(model: str) -> None:
    """Returns nothing."""


def words(model: str) -> dict[str, str]:
    """Returns no numbers."""
    return {"accuracy": "good"}


def infinite(model: str) -> dict[str, float]:
    """Returns a number of no use."""
    return {"accuracy": float("nan")}
