"""What a finished merge has to hold: every shared tensor, finite, and all that its class loads."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from pathlib import Path
from typing import Any

import torch

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor.inputs import values
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import Inputs, stop_at
from cart_plugin.execution.layout import Placed, missing, place
from cart_plugin.wording import count, some


def read_result(out: Path) -> Checkpoint:
    """The headers of a merged folder.

    Raises:
        CartError: it is no whole model.
    """
    written, findings = files.read_folder("of the merge", out)
    stop_at(findings)
    if not written.tensors:
        raise CartError("the models have no tensor name in common: nothing was merged")
    return written


def verify(written: Checkpoint, inputs: Inputs, suspects: Collection[str] | None = None) -> None:
    """Compare a merged model with its inputs and its own class.

    Args:
        written: the merged model.
        inputs: of the merge.
        suspects: the only tensors that can hold a NaN or an infinity; None if that is not known,
            and all of them are read.

    Raises:
        CartError: it lacks something, or something in it is of no use.
    """
    computed: set[str] = set()
    try:
        model = names.meta_model(written.path, written.config, written.name)
    except CartError:
        if _is_known(inputs):
            raise
        _check_names(written, inputs)
    else:
        result = place(model, written)
        computed = result.computed
        _check_model(model, result, inputs)
    _check_finite(written, inputs, computed, suspects)


def _is_known(inputs: Inputs) -> bool:
    """Whether transformers has the inputs' class; models may bring their own code."""
    try:
        names.model_class(inputs.donor.config, inputs.donor.name)
    except CartError:
        return False
    return True


def _check_names(written: Checkpoint, inputs: Inputs) -> None:
    if inputs.config.models:
        shared = set.intersection(*(set(held.tensors) for held in inputs.checkpoints.values()))
        _check_there(shared - set(written.tensors))


def _check_model(model: Any, result: Placed, inputs: Inputs) -> None:
    state = model.state_dict()
    for name, shape in result.shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise CartError(
                f"the merge is not what its config describes: {name} is {shape} and should be "
                f"{tuple(state[name].shape)}"
            )
    placed = [place(model, held) for held in inputs.checkpoints.values()]
    if inputs.config.models:
        shared = set.intersection(*({*held.units} - held.unused for held in placed))
        _check_there(shared - result.units.keys())
    # What no file of the model ever holds may be missing, in other layers too.
    donor = next(held for held in placed if held.checkpoint.name == inputs.donor.name)
    _check_there(missing(model, result, known=donor))


def _check_there(lacking: Iterable[str]) -> None:
    found = sorted(lacking)
    if found:
        raise CartError(
            f"the merge lacks {count(len(found), 'tensor')} that its inputs share: {some(found)}"
        )


def _check_finite(
    written: Checkpoint,
    inputs: Inputs,
    computed: Container[str],
    suspects: Collection[str] | None,
) -> None:
    loader = values(written)
    for name, info in written.tensors.items():
        if not info.is_floating or (suspects is not None and name not in suspects):
            continue
        tensor = loader.get_tensor(name)
        if bool(torch.isfinite(tensor).all()) or _is_a_mask(name, tensor, inputs.donor):
            continue
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        if name in computed and kind == "infinity":
            continue  # a mask's large value, in float16
        raise CartError(
            f"the merge holds {kind} in {name}; look for it in the inputs, or merge in a wider "
            "dtype (`dtype: float32`, `out_dtype: bfloat16`)"
        )


def _is_a_mask(name: str, tensor: torch.Tensor, donor: Checkpoint) -> bool:
    """Whether an input's buffer has its infinities in the same places."""
    if name not in donor.tensors or bool(torch.isnan(tensor).any()):
        return False
    own = values(donor).get_tensor(name)
    return bool(torch.equal(torch.isinf(own), torch.isinf(tensor)))
