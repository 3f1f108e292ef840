"""The base: the average of the models, an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from cart_plugin.compress import writing
from cart_plugin.compress.work import Work
from cart_plugin.errors import CartError
from cart_plugin.inputs import agreed_buffer, check_finite

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
_NOT_COPIED = ("config.json", "adapter_config.json", "trainer_state.json", "mergekit_config.yml")


def write_base(work: Work, folder: Path) -> None:
    """The average, rounded as it is stored, and which tensors differ from it anywhere."""
    folder.mkdir()
    files = writing.shards(work.layout)
    done = 0
    for file, layout in files.items():
        with writing.TensorFile(folder / file, layout) as opened:
            for name, (dtype, _) in layout.items():
                stored, same = _average(work, name, dtype)
                opened.write(name, stored)
                if not same:
                    work.changed.add(name)
                done += 1
                work.progress("averaging", done, len(work.layout))
    writing.write_index(folder, files)
    first = work.models[0]
    config = dict(first.config)
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in work.layout.values():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    if sizes:
        config.pop("torch_dtype", None)
        config["dtype"] = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in sorted(first.path.iterdir()):
        skipped = path.name in _NOT_COPIED or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not skipped:
            shutil.copyfile(path, folder / path.name)


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
    first: Tensor | None = None
    same = True
    for tensor in work.versions(name):
        if mean is None or first is None:
            kind = torch.promote_types(dtype, torch.promote_types(tensor.dtype, torch.float32))
            first, mean = tensor, torch.zeros(tensor.shape, dtype=kind)
        else:
            same = same and tensor.dtype == first.dtype and torch.equal(tensor, first)
        mean.add_(tensor, alpha=1 / len(work.models))
    assert mean is not None
    assert first is not None
    if not bool(torch.isfinite(mean.sum())):
        check_finite(mean, labels, list(work.versions(name)), where)
    # A mean of equal numbers is not always that number, to the last bit.
    stored = (first if same else mean).to(dtype)
    if not bool(torch.isfinite(stored.sum(dtype=torch.float64))):
        raise CartError(f"{where}: its values leave the range of {dtype}; choose another dtype")
    return stored, same
