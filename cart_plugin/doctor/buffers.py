"""Integer tensors, such as BatchNorm's counters: mergekit copies them if all models agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from torch import Tensor

from cart_plugin.checkpoints.headers import StoredTensor
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.inputs import values
from cart_plugin.doctor.layout import Recipe
from cart_plugin.doctor.merges import Merge
from cart_plugin.wording import count, some


def differing(merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """The planned integer tensors that are not the same in all inputs, in order.

    Of a single pickled file nothing is known: it would have to be loaded whole.
    """
    whole = [
        merge.planned
        for merge in merges
        if not any(info.is_floating for info in merge.inputs.values())
    ]
    first: dict[str, Tensor] = {}
    found = set()
    for label, held in checkpoints.items() if whole else ():
        read = _reader(held)
        if read is None:
            continue
        for planned in whole:
            stored = (name for name in planned.sources.get(label, ()) if name in held.tensors)
            if name := next(stored, None):
                tensor = read(name)
                other = first.setdefault(planned.name, tensor)
                if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                    found.add(planned.name)
    return sorted(found)


def _reader(held: Checkpoint) -> Callable[[str], Tensor] | None:
    if all(isinstance(info, StoredTensor) for info in held.tensors.values()):
        return held.read
    if held.path.is_dir():
        return values(held).get_tensor
    return None


def check_buffers(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report integers at which mergekit stops, whatever the method."""
    if found := differing(merges, checkpoints):
        yield problem(
            f"the models differ in {count(len(found), 'integer tensor')} ({some(found)}), as in "
            "BatchNorm's counters after trainings of different lengths: mergekit stops there",
            "make them equal in the files (of counters any value will do), or leave them out"
            if isinstance(config, RawPyTorchMergeConfig)
            else "merge with `mergekit-cart merge`, which keeps the largest count",
        )
