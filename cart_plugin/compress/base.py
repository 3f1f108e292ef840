"""The base: the average of the models, or a model that is given; an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cart_plugin.checkpoints import side_files, writing
from cart_plugin.checkpoints.files import write_json
from cart_plugin.checkpoints.reading import CONFIG
from cart_plugin.compress.work import Work
from cart_plugin.errors import CartError
from cart_plugin.merging.inputs import agreed_buffer, check_finite


def write_base(work: Work, folder: Path) -> None:
    """The base, rounded as it is stored, and which tensors of the models differ from it."""
    folder.mkdir()
    one, step = (_average, "averaging") if work.given is None else (_given, "reading the base")
    files = writing.shards(work.layout)
    computed = work.computed
    done = 0
    for file, layout in files.items():
        with writing.TensorFile(folder / file, layout) as opened:
            for name, (dtype, _) in layout.items():
                try:
                    stored, same = one(work, name, dtype)
                except CartError:
                    if name not in computed or not dtype.is_floating_point:
                        raise
                    # No weight: old masks are infinite in fp16.
                    stored, same = work.described.read(name).to(dtype), True
                opened.write(name, stored)
                if not same:
                    work.changed.add(name)
                done += 1
                work.progress(step, done, len(work.layout))
    writing.write_index(folder, files)
    config = dict(work.described.config)
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in work.layout.values():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    if sizes:
        config.pop("torch_dtype", None)
        config["dtype"] = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    write_json(folder / CONFIG, config, sort_keys=True)
    side_files.copy_to_base(folder, [work.described.path, work.models[0].path])


def _average(work: Work, name: str, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """What the base stores of a tensor, and whether all models hold the same.

    Raises:
        CartError: a model's values are not finite, or integers differ.
    """
    labels = [model.name for model in work.models]
    where = f"tensor {name!r}"
    if not dtype.is_floating_point:
        return agreed_buffer(list(work.versions(name)), labels, name), True
    mean: Tensor | None = None
    common: Tensor | None = None  # what all models hold, as far as they have been read
    for tensor in work.versions(name):
        if mean is None:
            kind = torch.promote_types(dtype, torch.promote_types(tensor.dtype, torch.float32))
            common, mean = tensor, torch.zeros_like(tensor, dtype=kind)
        elif common is not None and not _same(tensor, common):
            common = None
        mean.add_(tensor, alpha=1 / len(work.models))
        del tensor  # before the next one is read
    assert mean is not None
    if not bool(torch.isfinite(mean.sum())):
        check_finite(mean, labels, list(work.versions(name)), where)
    # A mean of equal numbers is not always that number, to the last bit.
    return _rounded(mean if common is None else common, dtype, where), common is not None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _given(work: Work, name: str, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """What the base stores of the given model's tensor, and whether all models hold the same.

    Raises:
        CartError: values are not finite, or integers differ.
    """
    base = work.described
    where = f"tensor {name!r}"
    own = base.read(name)
    if not dtype.is_floating_point:
        labels = [model.name for model in (*work.models, base)]
        agreed_buffer([*work.versions(name), own], labels, name)
        return own.to(dtype), True  # of counters its own, too: it is that model
    check_finite(own, [base.name], [own], where)
    stored = _rounded(own, dtype, where)
    same = True
    for model, tensor in zip(work.models, work.versions(name), strict=True):
        check_finite(tensor, [model.name], [tensor], where)
        same = torch.equal(_rounded(tensor, dtype, where), stored) and same
    return stored, same


def _rounded(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """A tensor as it is stored.

    Raises:
        CartError: the dtype does not hold it.
    """
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored.sum(dtype=torch.float64))):
        raise CartError(f"{where}: its values leave the range of {dtype}; choose another dtype")
    return stored
