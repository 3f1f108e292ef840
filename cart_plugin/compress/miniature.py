"""A real model, small and random, with the modules of a large one, and where it can be run.

Whether PEFT computes what dense weights would depends on the code of the modules, not on sizes: so
that can be tried without the memory for the model. Each module keeps its name, its class and the
kinds of its parameters, layers and heads keep their numbers; widths shrink.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cart_plugin.compress.trial_inputs import candidates, configs_of

_SMALL = 2**22  # numbers: a model of so few is taken as it is
_ROOM = 2**25  # numbers: what a miniature may have
_DIVISORS = (128, 64, 32, 16, 8, 4, 2)
_NOISE = 0.05
_EXPERTS_LEFT = 16  # of stacked experts: a router has a choice, also among groups of them
_EXPERTS = re.compile(r"(?:num|n)_(?:\w+_)?experts$")

# Widths that stand in a fixed relation: where all are divided by one number, the relation stays.
_WIDTH = re.compile(
    r"(?:size|dim|rank|width|channel|filter|section)s?(?:_|$)|_dim|n_embd|n_inner|^d_|embed_dim"
)
# Counts, and sizes of what is fed.
_NO_WIDTH = re.compile(
    r"^(?:num|n)_(?!embd|inner)|image|patch|vocab|window|kernel|batch|group|position|crop|^max_"
    r"|cache|type|^in_chan|block|merge|bucket|stride|pool(?!er)|mask|conv_(?!dim)|d_conv|label|queue|beam"
)


@dataclass(frozen=True)
class Run:
    """A part of a model that can be called, and with what.

    Attributes:
        path: of the part; empty for the whole.
        arguments: of its forward.
    """

    path: str
    arguments: Mapping[str, Tensor]

    def answer(self, model: Any) -> list[Tensor]:
        """The floating-point tensors that a model's part answers, in fp64."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            arguments = {name: value.clone() for name, value in self.arguments.items()}
            return list(_tensors(model.get_submodule(self.path)(**arguments)))


@dataclass(frozen=True)
class Miniature:
    """A small model that answers.

    Attributes:
        model: it.
        runs: the parts that are called: the whole, and models inside that it does not call.
        reached: the modules whose forward is called on the way.
        is_complete: whether the model and all models inside it are called.
    """

    model: Any
    runs: tuple[Run, ...]
    reached: frozenset[str]
    is_complete: bool


def miniature(model: Any) -> Miniature | None:
    """A small model of the same modules that can be run, or None if there is no way to.

    Args:
        model: from `checkpoints.names.meta_model`; not modified.

    Of several sizes the smallest is taken, or the one of which most modules can be run.
    """
    is_small = sum(tensor.numel() for tensor in model.parameters()) <= _SMALL
    configs = [_shrunk(model.config, divisor) for divisor in ((1,) if is_small else _DIVISORS)]
    sizes = [(size, config) for config in configs if (size := _size(model, config)) is not None]
    best: Miniature | None = None
    for _, config in sorted(sizes, key=lambda entry: entry[0]):
        for kind in (torch.float64, torch.float32):
            small = _random(type(model), config)
            if small is None:
                break
            found = _runnable(small.to(kind))
            if best is None or len(found.reached) > len(best.reached):
                best = found
            if found.is_complete:
                return found
    return best if best is not None and best.runs else None


def _shrunk(config: Any, divisor: int) -> Any:
    """A copy of a config with widths and vocabularies divided, and fewer experts."""
    found = copy.deepcopy(config)
    if divisor == 1:
        return found
    words = 0
    for part in configs_of(found):
        for key, value in list(vars(part).items()):
            if key == "max_source_positions" and _is_count(
                value
            ):  # of sounds: minutes of attention
                _set(part, key, max(value // divisor, min(value, 64)))
            elif "vocab" in key and _is_count(value):
                smaller = max(value // divisor, min(value, 64))
                words = max(words, smaller)
                _set(part, key, smaller)
            elif isinstance(value, dict):
                _set(
                    part,
                    key,
                    {inner: _smaller(inner, held, divisor) for inner, held in value.items()},
                )
            else:
                _set(part, key, _smaller(key, value, divisor))
    for part in configs_of(found):  # tokens that the small vocabulary has
        for key, value in list(vars(part).items()):
            if key.endswith(("token_id", "token_index")) and _is_count(value) and words:
                _set(part, key, value % words)
    return found


def _smaller(key: Any, value: Any, divisor: int) -> Any:
    """A setting as it is in the small model."""
    name = str(key)
    if "section" in name and isinstance(value, list | tuple) and all(map(_is_count, value)):
        return type(value)(_apportioned(value, divisor))
    if _EXPERTS.search(name) and _is_count(value) and value % _EXPERTS_LEFT == 0:
        return min(value, _EXPERTS_LEFT)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        return _divided(value, divisor)
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_divided(entry, divisor) for entry in value)
    if _is_count(value) and value % divisor == 0 and value // divisor >= 2:
        return value // divisor
    return value


def _apportioned(parts: Sequence[int], divisor: int) -> list[int]:
    """Parts of a whole that is divided: its sum is right, the largest remainders are rounded up."""
    total = sum(parts)
    if total % divisor:
        return list(parts)
    found = [part // divisor for part in parts]
    order = sorted(range(len(parts)), key=lambda index: -(parts[index] % divisor))
    for index in order[: total // divisor - sum(found)]:
        found[index] += 1
    return found


def _set(config: Any, key: str, value: Any) -> None:
    object.__setattr__(config, key, value)  # a check of one value may not fit the next one


def _size(model: Any, config: Any) -> int | None:
    """Numbers of a config's model; None if it is too large, or has other modules."""
    try:
        with torch.device("meta"):
            small = type(model)(config)
    except Exception:
        return None  # transformers' classes refuse sizes that do not fit in ways of their own
    found = sum(tensor.numel() for tensor in small.parameters())
    return found if found <= _ROOM and _shape(small) == _shape(model) else None


def _shape(model: Any) -> tuple[dict[str, str], dict[str, int]]:
    return (
        # By name: a parametrisation makes a class for each module.
        {name: type(module).__name__ for name, module in model.named_modules()},
        {name: tensor.ndim for name, tensor in model.state_dict().items()},
    )


def _random(kind: Any, config: Any) -> Any:
    """A model with random values, norms and biases included; None if these sizes do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = kind(copy.deepcopy(config))
        except Exception:
            return None  # what values start from may want other sizes than the shapes do
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.add_(torch.randn_like(parameter), alpha=_NOISE)
    model.set_experts_implementation("eager")  # fused kernels want even sizes
    return model.eval().requires_grad_(False)


def _runnable(model: Any) -> Miniature:
    """What of a model can be run: the whole first, then models inside that it has not called."""
    from transformers import PreTrainedModel

    runs: list[Run] = []
    reached: set[str] = set()
    is_complete = True
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = f"{path}." if path else ""
        inside = {
            f"{start}{name}".rstrip(".")
            for name, part in module.named_modules()
            if next(part.parameters(recurse=False), None) is not None
        }
        if inside <= reached:
            continue
        for arguments in candidates(module):
            run = Run(path, arguments)
            called = _called(model, run)
            if called is not None:
                if not called <= reached:
                    runs.append(run)
                    reached |= called
                break
        else:
            is_complete = False
    return Miniature(model, tuple(runs), frozenset(reached), is_complete)


def _called(model: Any, run: Run) -> set[str] | None:
    """The modules that a run calls; None if it fails or answers no finite numbers."""
    called: set[str] = set()

    def hook(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules()
    ]
    try:
        answer = run.answer(model)
    except Exception:
        return None  # these were not its arguments: each model says so in a way of its own
    finally:
        for handle in handles:
            handle.remove()
    finite = any(bool(torch.isfinite(tensor).any()) for tensor in answer)
    return called if finite else None


def _tensors(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        if answer.is_floating_point():
            yield answer.double()
    elif isinstance(answer, Mapping):
        for value in answer.values():
            yield from _tensors(value)
    elif isinstance(answer, list | tuple):
        for value in answer:
            yield from _tensors(value)
