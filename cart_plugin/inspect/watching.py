"""What a loaded model multiplies its weights by, through hooks of torch alone.

Linear layers (and GPT-2's `Conv1D`) get hooks. Other parameters, such as a router's or stacked
experts, are told by their place in memory, in the products that torch is asked for: of a stack
(transformers 5) each expert is a view. That needs the plain implementation of experts, which others
in transformers, that copy or sort the weights first, are equal to.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cart_plugin.checkpoints import names

Keep = Callable[[str, int | None, Tensor, bool], None]
"""Is told a parameter's name, the expert (None but for stacks), inputs ``(..., n)``, and whether
the parameter is stored as (inputs, outputs)."""

# Functions of torch and where their weight stands; what it is multiplied by stands before it.
_PRODUCTS = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm"), 1),
    **dict.fromkeys(("addmm", "baddbmm"), 2),
}


class Place(NamedTuple):
    """Where a weight of a file is in the model.

    Attributes:
        parameter: by the model's name.
        expert: the number in a stack; None for all of it, and for what is none.
    """

    parameter: str
    expert: int | None = None


def places(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where the weights of a file are in the model that was loaded from it.

    Args:
        model: of transformers.
        shapes: of the file's tensors.

    Returns:
        Those of which that is known: not of such that are split or turned.
    """
    found: dict[str, Place] = {}
    for unit in names.one_way(model, shapes):
        if len(unit.targets) == len(unit.sources) == 1 and not unit.is_converted:
            found[unit.sources[0]] = Place(unit.targets[0])
        elif unit.targets:
            found.update(_joined(unit, shapes))
    return found


def _joined(unit: names.Unit, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
    """Where matrices are that are stacked or joined row by row: such keep their inputs.

    Told by what becomes of rows that are numbered.
    """
    if any(len(shapes[source]) != 2 for source in unit.sources):
        return
    rows = {source: torch.full((1, 2), float(number)) for number, source in enumerate(unit.sources)}
    try:
        joined = unit.to_model(rows)
    except Exception:  # transformers' conversion wants the real shapes: then nothing is known
        return
    for target, tensor in joined.items():
        if tensor.ndim not in (2, 3) or tensor.shape[-1] != 2:
            continue
        for number, source in enumerate(unit.sources):
            held = {int(place[0]) for place in (tensor == number).nonzero()}
            if tensor.ndim == 2 and held:
                yield source, Place(target)
            elif len(held) == 1:
                yield source, Place(target, held.pop())


@contextmanager
def watched(model: nn.Module, wanted: Collection[str], keep: Keep) -> Iterator[None]:
    """Tell what parameters are multiplied by, as long as the context lasts.

    Args:
        model: on the CPU.
        wanted: the names of its parameters.
        keep: is told.
    """
    from transformers.pytorch_utils import Conv1D

    rest = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if name in rest and isinstance(module, nn.Linear | Conv1D):
                del rest[name]
                hook = _hook(name, keep, turned=isinstance(module, Conv1D))
                stack.callback(module.register_forward_pre_hook(hook).remove)
        matrices = {name: one for name, one in rest.items() if one.ndim in (2, 3)}
        if any(parameter.ndim == 3 for parameter in matrices.values()):
            choose: Any = getattr(model, "set_experts_implementation", None)
            if choose is not None:
                choose("eager")
        if matrices:
            stack.enter_context(_Products(matrices, keep))
        yield


def _hook(name: str, keep: Keep, *, turned: bool) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        keep(name, None, arguments[0], turned)

    return hook


class _Products(TorchFunctionMode):
    """Sees the products of parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], keep: Keep) -> None:
        super().__init__()
        self._keep = keep
        held = sorted((one.data_ptr(), name, one) for name, one in parameters.items())
        self._starts = [start for start, _, _ in held]
        self._held = [(name, one) for _, name, one in held]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        place = _PRODUCTS.get(getattr(func, "__name__", ""))
        if place is not None and len(args) > place:
            inputs, weight = args[place - 1 : place + 1]
            if isinstance(inputs, Tensor) and isinstance(weight, Tensor):
                self._see(inputs, weight, is_linear=func.__name__ == "linear")
        return func(*args, **(kwargs or {}))

    def _see(self, inputs: Tensor, weight: Tensor, *, is_linear: bool) -> None:
        index = bisect.bisect_right(self._starts, weight.data_ptr()) - 1
        if index < 0 or weight.ndim < 2:
            return
        name, parameter = self._held[index]
        offset = weight.data_ptr() - parameter.data_ptr()
        if offset >= parameter.numel() * parameter.element_size():
            return
        summed = -1 if is_linear else -2
        turned = _same(weight, summed, parameter, -2)
        if not turned and not _same(weight, summed, parameter, -1):
            return  # a part of its inputs
        if parameter.ndim == 2:
            self._keep(name, None, inputs, turned)
        elif weight.ndim == 2:
            expert = offset // (parameter.stride(0) * parameter.element_size())
            self._keep(name, expert, inputs, turned)
        elif weight.shape == parameter.shape and inputs.shape[:-2] == weight.shape[:1]:
            for expert, rows in enumerate(inputs):
                self._keep(name, expert, rows, turned)


def _same(view: Tensor, own: int, parameter: Tensor, side: int) -> bool:
    """Whether a side of a view is a side of the parameter."""
    return (view.stride(own), view.shape[own]) == (parameter.stride(side), parameter.shape[side])
