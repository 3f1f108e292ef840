"""Files of what a run has adapted: coefficients, masks, and the state that it can go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from cart_plugin.checkpoints.files import replacing
from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.merged import Merged

_FORMAT = "cart-adapted-1"
_MASK = "mask."
# How far norms of the same models may lie apart on other devices.
_TOLERANCE = 1e-3


def save_adapted(path: Path, module: Merged, tasks: Sequence[str]) -> None:
    """Write coefficients and masks as a safetensors file.

    ``coefficients`` as in `Merged`, ``mask.<parameter>`` as bool, ``(stack, K)`` with the tasks'
    directions side by side, and ``sizes``, the norms that tell these models from others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "coefficients": module.merge_weight.detach().cpu(),
        "sizes": module.sizes,
        **{f"{_MASK}{name}": term.mask.cpu() for name, term in module.masked.items()},
    }
    with replacing(path) as scratch:
        save_file(tensors, scratch, {"format": _FORMAT, "tasks": json.dumps(list(tasks))})


def load_adapted(path: Path, module: Merged, tasks: Sequence[str]) -> None:
    """Read what `save_adapted` wrote; or, where there are no masks, FusionBench's AdaMerging.

    Its file is one tensor of coefficients, as of ``torch.save``: nothing tells of which models.

    Raises:
        CartError: another file, or one of other models, tasks or settings.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if module.masked:
            raise CartError(f"{path} does not load as a file of masks: {error}") from error
        _load_tensor(path, module)
        return
    if metadata.get("format") != _FORMAT or not {"coefficients", "sizes"} <= set(found):
        raise CartError(f"{path} holds nothing that an adaptation has saved")
    if (theirs := json.loads(metadata["tasks"])) != list(tasks):
        raise CartError(
            f"{path} was adapted to {', '.join(theirs)}, the pool has {', '.join(tasks)}"
        )
    _check_sizes(path, module, found["sizes"])
    _set_coefficients(path, module, found["coefficients"])
    masked = module.masked
    masks = {name.removeprefix(_MASK): one for name, one in found.items() if name.startswith(_MASK)}
    if masks and not masked:
        raise CartError(f"{path} holds masks: of cart/adarank, which this method is not")
    for name, term in masked.items():
        mask = masks.get(name)
        if mask is None or mask.shape != term.values.shape:
            what = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
            raise CartError(
                f"{path} has {what} in the place of a mask of shape {tuple(term.values.shape)} for "
                f"{name}: give the run's rank rule and candidates"
            )
        assert term.scores is not None
        term.scores.data = mask.to(term.scores)


def _load_tensor(path: Path, module: Merged) -> None:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CartError(
            f"{path} holds neither what an adaptation has saved nor a tensor of coefficients: "
            f"{error}"
        ) from error
    _set_coefficients(path, module, found)


def save_state(
    path: Path,
    module: Merged,
    optimizer: Optimizer,
    precision: Precision,
    step: int,
    run: Mapping[str, Any],
) -> None:
    """Write what a run needs to go on.

    Args:
        path: the file.
        module: the merged model.
        optimizer: its optimizer.
        precision: fabric's, which scales losses in fp16 by what it has seen of gradients.
        step: steps that are done.
        run: the settings that another run has to have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "run": dict(run),
        "sizes": module.sizes,
        "adapted": {name: tensor.detach().cpu() for name, tensor in _adapted(module).items()},
        "optimizer": optimizer.state_dict(),
        "precision": precision.state_dict(),
    }
    with replacing(path) as scratch:
        torch.save(state, scratch)


def load_state(
    path: Path,
    module: Merged,
    optimizer: Optimizer,
    precision: Precision,
    run: Mapping[str, Any],
) -> int:
    """Take up what `save_state` wrote.

    Returns:
        Steps that are done.

    Raises:
        CartError: another file, or the state of a run with other settings or models.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, step, adapted = state["run"], int(state["step"]), state["adapted"]
        sizes, of_optimizer, scale = state["sizes"], state["optimizer"], state["precision"]
    except Exception as error:
        raise CartError(
            f"checkpoint_path: {path} does not load as the state of a run: {error}; remove it"
        ) from error
    for name, value in run.items():
        if theirs.get(name) != value:
            raise CartError(
                f"checkpoint_path: {path} is of a run with {name}={theirs.get(name)}, this one has "
                f"{value}; remove it, or give another path"
            )
    _check_sizes(path, module, sizes)
    own = _adapted(module)
    for name, tensor in own.items():
        if name not in adapted or adapted[name].shape != tensor.shape:
            raise CartError(
                f"checkpoint_path: {path} is of a run that adapts other numbers ({name}); remove "
                "it, or give another path"
            )
    for name, tensor in own.items():
        tensor.data.copy_(adapted[name])
    optimizer.load_state_dict(of_optimizer)
    precision.load_state_dict(scale)
    return step


def _adapted(module: Merged) -> dict[str, Tensor]:
    return {name: one for name, one in module.named_parameters() if one.requires_grad}


def _check_sizes(path: Path, module: Merged, found: Tensor) -> None:
    expected = module.sizes
    if found.shape == expected.shape:
        least = _TOLERANCE * float(expected.max()) * 1e-3  # rounding has a norm, too
        differ = (found - expected).abs() > _TOLERANCE * expected + least
        if not bool(differ.any()):
            return
        where = f": {module.names[int(differ.any(dim=0).to(torch.int8).argmax())]} differs"
    else:
        where = f": {found.shape[1]} parameters of {found.shape[0] - 1} tasks"
    raise CartError(
        f"{path} is of other models, or of another rank rule, centre, weights or candidates{where}"
    )


def _set_coefficients(path: Path, module: Merged, found: Any) -> None:
    shape = module.merge_weight.shape
    if not isinstance(found, Tensor) or found.shape != shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CartError(
            f"{path} holds {what}, but these models need coefficients of shape {tuple(shape)}: "
            "(tasks, parameters) with granularity layer, (tasks,) with granularity task"
        )
    if not bool(torch.isfinite(found).all()):
        raise CartError(f"{path} holds coefficients that are NaN or infinite; adapt them again")
    module.merge_weight.data = found.detach().to(torch.float32)
