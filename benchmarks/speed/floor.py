"""What no merge can do without, each part alone, and what `cart` takes beyond it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cart_plugin import CartSettings, merge_tensors, truncated_svd
from cart_plugin.checkpoints.reading import Checkpoint, open_folder
from cart_plugin.checkpoints.writing import TensorFile
from cart_plugin.linalg import krylov
from cart_plugin.merging import differences

RATIO = 0.08
_REPEATS = 3


def floor(models: Sequence[Path], scratch: Path) -> dict[str, float]:
    """Seconds of each part, by one thread.

    Args:
        models: folders.
        scratch: where one model's weights are written.

    Returns:
        ``reading`` all inputs and ``writing`` a result; ``products`` of the decompositions with the
        matrices themselves, which no block Krylov iteration does without; ``decompositions`` as
        they are, with these; and all else of ``merging``: means, differences, checks, sums.
    """
    opened = [open_folder(model, model.name) for model in models]
    first = opened[0]
    reading = _seconds(lambda: [model.read(name) for model in opened for name in model.tensors])
    return {"reading": reading, "writing": _writing(first, scratch), **_merging(opened)}


def _writing(model: Checkpoint, scratch: Path) -> float:
    held = {name: model.read(name) for name in model.tensors}
    file = scratch / "floor.safetensors"

    def write() -> None:
        with TensorFile(file, model.layout) as opened:
            for name, tensor in held.items():
                opened.write(name, tensor)

    seconds = _seconds(write)
    file.unlink()
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _merging(models: Sequence[Checkpoint]) -> dict[str, float]:
    """Of a shape that comes again, one is merged."""
    shapes = Counter(info.shape for info in models[0].tensors.values())
    example = {info.shape: name for name, info in models[0].tensors.items()}
    threads, total = torch.get_num_threads(), Counter[str]()
    torch.set_num_threads(1)
    try:
        for shape, count in shapes.items():
            name = example[shape]
            found = _one([model.read(name) for model in models], name)
            total.update({part: count * seconds for part, seconds in found.items()})
    finally:
        torch.set_num_threads(threads)
    return dict(total)


def _one(tensors: list[Tensor], name: str) -> dict[str, float]:
    """Seconds to merge one tensor, and what of it are decompositions and their products."""
    truncated, extend = truncated_svd, krylov._extend
    decompositions, products = 0.0, 0.0
    bases: list[tuple[int, int]] = []

    def timed(matrix: Tensor, *arguments: Any, **named: Any) -> Any:
        nonlocal decompositions, products
        bases.clear()
        begun = time.perf_counter()
        found = truncated(matrix, *arguments, **named)
        decompositions += time.perf_counter() - begun
        short, long = sorted(matrix.shape[-2:])
        if bases:  # of `fast`: two products a block
            basis, block = bases[-1]
            rows, x = torch.randn(block, short), matrix.reshape(short, long)
            each = min(
                _seconds(lambda: krylov.times_transposed(rows @ x, x)) for _ in range(_REPEATS)
            )
            products += each * basis / block
        return found

    def noted(*arguments: Any) -> Any:
        found = extend(*arguments)
        bases.append((found[0].shape[-2], found[2].shape[-2]))
        return found

    settings = CartSettings(rank_ratio=RATIO)
    decompose = False if is_table(name) else None
    whole = _seconds(lambda: merge_tensors(tensors, settings, name=name, decompose=decompose))
    with patch.object(differences, "truncated_svd", timed), patch.object(krylov, "_extend", noted):
        merge_tensors(tensors, settings, name=name, decompose=decompose)
    return {
        "products": products,
        "decompositions": decompositions,
        "merging": max(0.0, whole - decompositions),
    }


def is_table(name: str) -> bool:
    """Whether a Llama's tensor has a row for each token, and is averaged."""
    return "embed_tokens" in name or "lm_head" in name
