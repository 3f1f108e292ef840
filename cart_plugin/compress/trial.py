"""One plan tried on a small model: random adapters in PEFT, and the weights that they stand for."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Assignment, Structure, nested
from cart_plugin.compress.miniature import Miniature
from cart_plugin.errors import CartError, first_line

# Of what the kind's dense weights change: an adapter that a layer does not use is 1 off.
_TOLERANCE = 1e-3
# Of the answers: below it are the roundings of models that compute some of their steps in fp32.
_ROUNDING = 1e-6
_STRENGTH = 0.3  # of a random difference, relative to the weights
_RANK = 2

_ADAPTER = ".default"  # PEFT's name of it in a model
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Answer(Enum):
    """What PEFT makes of a kind of modules: what it should, something else, or nothing visible."""

    RIGHT = "right"
    OTHER = "other"
    THE_BASES = "the base's"


@dataclass(frozen=True)
class Kind:
    """Modules that differ in their numbers only: the same layer of all blocks."""

    is_saved: bool  # stored whole, rather than given LoRA
    modules: tuple[str, ...]


class Trial:
    """A small model, random adapters for it, and what it answers with them and without PEFT."""

    def __init__(
        self,
        small: Miniature,
        assignment: Assignment,
        structure: Structure,
        task_type: str | None,
        one_rank: bool,
    ) -> None:
        """Answer without an adapter; ``one_rank`` says that no layer's will differ from others'."""
        self._one_rank = one_rank
        self.kinds = _kinds(assignment)
        self._small = small
        self._assignment = assignment
        self._structure = structure
        self._task_type = task_type
        self._state: dict[str, Tensor] = small.model.state_dict()
        self._base = self._answers(small.model)
        self._loaded: tuple[Any, dict[str, Tensor]] | None = None

    def failure(self, kinds: Sequence[Kind]) -> str | None:
        """Why PEFT cannot wrap, load and run the plan for some kinds; None if it can."""
        plan = self._part(kinds)
        try:
            model = self._wrapped(plan)
            lost = self._misplaced(model, plan)
            if lost is not None:
                return lost
            values = self._random(plan)
            lost = self._lost(model, values)
            if lost is not None:
                return lost
            if self._small.runs:
                self._answers(model.get_base_model())
                if len(kinds) == len(self.kinds):
                    self._loaded = model, values
        except Exception as error:  # of PEFT, or of any model's code that meets PEFT's layers
            return f"PEFT cannot run it: {first_line(error)}"
        return None

    def compared(self) -> Iterator[tuple[Kind, Answer]]:
        """How the model answers with each kind alone; of a plan that PEFT can run.

        Without anything to run nothing is known: as if no answer depended on any kind.
        """
        if self._loaded is None:
            yield from ((kind, Answer.THE_BASES) for kind in self.kinds)
            return
        model, values = self._loaded
        neutral, held = self._neutral(values), _held(model)
        _set(held, neutral)
        for kind in self.kinds:
            own = {name: values[name] for name in self._names(kind) if name in values}
            _set(held, own)
            effect, error = self._difference(model, {**neutral, **own})
            _set(held, {name: neutral[name] for name in own if name in neutral})
            if error > max(_TOLERANCE * effect, _ROUNDING):
                yield kind, Answer.OTHER
            else:
                yield kind, Answer.RIGHT if effect > _ROUNDING else Answer.THE_BASES

    def check_together(self) -> None:
        """Refuse a plan of which the model answers otherwise with all kinds at once.

        Raises:
            CartError: it does.
        """
        if self._loaded is None:
            return
        model, values = self._loaded
        _set(_held(model), values)
        effect, error = self._difference(model, values)
        if error > max(_TOLERANCE * effect, _ROUNDING):
            raise CartError(
                "PEFT answers otherwise with these adapters than the weights that they stand for "
                f"(off by {error:.1e}, where these change {effect:.1e}), though with each kind of "
                "layer alone it does not: this architecture cannot be compressed"
            )

    def _difference(self, model: Any, values: Mapping[str, Tensor]) -> tuple[float, float]:
        """How far dense weights move the answers, and how far PEFT's are from those."""
        adapted = self._answers(model.get_base_model())
        dense = self._dense(values)
        return _distance(dense, self._base, self._base), _distance(adapted, dense, self._base)

    def _part(self, kinds: Sequence[Kind]) -> Assignment:
        """The plan for some kinds of modules only."""
        layers = {module for kind in kinds if not kind.is_saved for module in kind.modules}
        saved = [module for kind in kinds if kind.is_saved for module in kind.modules]
        plan = self._assignment
        lora = {name: layer for name, layer in plan.lora.items() if layer.module in layers}
        inside = tuple(f"{module}." for module in saved)
        exact = {name: source for name, source in plan.exact.items() if name.startswith(inside)}
        return replace(plan, lora=nested(lora, self._structure), saved=saved, exact=exact)

    def _wrapped(self, plan: Assignment) -> Any:
        from peft import get_peft_model

        model = self._small.model
        ranks = dict.fromkeys(plan.lora, _RANK)
        modules = self._structure.modules
        config = peft_files.lora_config(plan, ranks, modules, self._task_type)
        if not self._one_rank:
            # Each by a pattern, which PEFT has to find, as in adapters with several ranks.
            keys = map(peft_files.pattern_key, plan.lora.values())
            config.r, config.rank_pattern = _RANK - 1, dict.fromkeys(keys, _RANK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without values of its own the model is on the meta device, and PEFT's layers too.
            is_empty = not self._small.runs
            found = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=is_empty)
        return found.eval().requires_grad_(False)

    def _misplaced(self, model: Any, plan: Assignment) -> str | None:
        """What PEFT would load of a plan's files otherwise than planned, if anything."""
        got = set(_held(model))
        wanted = self._layout(plan).keys() | {peft_files.exact_name(name) for name in plan.exact}
        if wanted - got:
            return f"PEFT has no place for {min(wanted - got)}"
        return f"PEFT would add {min(got - wanted)}" if got - wanted else None

    def _layout(self, plan: Assignment) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        ranks = dict.fromkeys(plan.lora, _RANK)
        dtypes = {name: self._state[name].dtype for name in plan.lora}
        return peft_files.tensor_layout(self._resized(plan), ranks, dtypes)

    def _resized(self, plan: Assignment) -> Assignment:
        """A plan with the small model's shapes."""
        sizes = {
            name: replace(layer, shape=tuple(self._state[name].shape))
            for name, layer in plan.lora.items()
        }
        return replace(plan, lora=sizes)

    def _random(self, plan: Assignment) -> dict[str, Tensor]:
        """The tensors of an adapter; all zeros that take no memory where nothing runs."""
        if not self._small.runs:
            layout = self._layout(plan)
            for name, source in plan.exact.items():
                value = self._state[source]
                layout[peft_files.exact_name(name)] = value.dtype, tuple(value.shape)
            return {
                name: torch.zeros((), dtype=dtype).expand(shape)
                for name, (dtype, shape) in layout.items()
            }
        random = torch.Generator().manual_seed(3)
        values = {
            name: torch.randn(shape, generator=random, dtype=dtype)
            for name, (dtype, shape) in self._layout(plan).items()
        }
        for name, layer in plan.lora.items():
            size = _STRENGTH * float(self._state[name].square().mean().sqrt())
            values[peft_files.lora_name(layer, "B")] *= size / math.sqrt(_RANK)
            if layer.bias is not None:
                values[peft_files.bias_name(layer)] *= size
            elif peft_files.bias_name(layer) in values:  # PEFT wants one: there is none to change
                values[peft_files.bias_name(layer)].zero_()
        changed: dict[str, Tensor] = {}
        for name, source in plan.exact.items():
            value = self._state[source]
            if source not in changed:
                noise = torch.rand(value.shape, generator=random, dtype=torch.float64)
                # Signs stay, of variances above all.
                grown = value * (1 + _STRENGTH * noise)
                changed[source] = grown.to(value.dtype) if value.is_floating_point() else value
            values[peft_files.exact_name(name)] = changed[source].clone()
        return values

    def _neutral(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter that leaves the model as it is; whatever A is, B is zero."""
        plan = self._assignment
        found = {}
        for layer in plan.lora.values():
            for name in (peft_files.lora_name(layer, "B"), peft_files.bias_name(layer)):
                if name in values:
                    found[name] = torch.zeros_like(values[name])
        for name, source in plan.exact.items():
            found[peft_files.exact_name(name)] = self._state[source].clone()
        return found

    def _names(self, kind: Kind) -> Iterator[str]:
        """The tensors of an adapter that a kind's modules take; of tied weights all."""
        plan = self._assignment
        if kind.is_saved:
            inside = tuple(f"{module}." for module in kind.modules)
            moved = {source for name, source in plan.exact.items() if name.startswith(inside)}
            for name, source in plan.exact.items():
                if source in moved:
                    yield peft_files.exact_name(name)
            return
        for layer in plan.lora.values():
            if layer.module in kind.modules:
                yield from (peft_files.lora_name(layer, side) for side in "AB")
                yield peft_files.bias_name(layer)

    def _lost(self, model: Any, values: Mapping[str, Tensor]) -> str | None:
        """Load an adapter; what of it PEFT does not load, if anything.

        PEFT 0.21.2 on transformers 5 renames an adapter's tensors as it would those of older
        checkpoints, also where the model has them by their names: then they are nobody's.
        """
        from peft import set_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = set_peft_model_state_dict(
                model, dict(values), low_cpu_mem_usage=not self._small.runs
            )
        if not self._small.runs:  # PEFT has moved all to where the model is: there are no values
            lost = [*found.unexpected_keys, *(key for key in found.missing_keys if _ADAPTER in key)]
            return f"PEFT does not load {min(lost)}" if lost else None
        held = _held(model)
        for name, value in values.items():
            got = held.get(name)
            if got is None or got.shape != value.shape or not torch.equal(got, value):
                return f"PEFT does not load {name}"
        return None

    def _dense(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The answers of the small model itself, with the weights that an adapter stands for.

        Tensors of an adapter that are not given stand for no difference.
        """
        plan = self._resized(self._assignment)
        weights: dict[str, Tensor] = {}
        for name, layer in plan.lora.items():
            a, b = (values.get(peft_files.lora_name(layer, side)) for side in "AB")
            if a is not None and b is not None:
                weights[name] = self._state[name] + layer.difference(a, b)
            delta = values.get(peft_files.bias_name(layer))
            if layer.bias is not None and delta is not None:
                weights[layer.bias] = self._state[layer.bias] + delta
        for name, source in plan.exact.items():
            weights[source] = values[peft_files.exact_name(name)]
        kept = {name: self._state[name].clone() for name in weights}
        try:
            for name, weight in weights.items():
                self._state[name].copy_(weight)
            return self._answers(self._small.model)
        finally:
            for name, weight in kept.items():
                self._state[name].copy_(weight)

    def _answers(self, model: Any) -> list[Tensor]:
        return [tensor for run in self._small.runs for tensor in run.answer(model)]


def _kinds(assignment: Assignment) -> list[Kind]:
    """LoRA layers first."""
    groups: dict[tuple[bool, str], dict[str, None]] = {}
    for layer in assignment.lora.values():
        groups.setdefault((False, _NUMBER.sub("*", layer.module)), {})[layer.module] = None
    for module in assignment.saved:
        groups.setdefault((True, _NUMBER.sub("*", module)), {})[module] = None
    return [Kind(saved, tuple(modules)) for (saved, _), modules in groups.items()]


def _distance(one: list[Tensor], other: list[Tensor], base: list[Tensor]) -> float:
    """The largest difference of two answers, relative to the base's; masked entries aside."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return math.inf
    largest = 0.0
    for here, there, around in zip(one, other, base, strict=True):
        finite = torch.isfinite(around)
        size = float(around[finite].norm())
        if size == 0:
            continue
        found = float((here[finite] - there[finite]).norm()) / size
        largest = max(largest, found if math.isfinite(found) else math.inf)
    return largest


def _held(model: Any) -> dict[str, Tensor]:
    """An adapter's tensors in a model that has loaded it, by the names in its file: not copies."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, save_embedding_layers=False)


def _set(held: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        held[name].copy_(value)
