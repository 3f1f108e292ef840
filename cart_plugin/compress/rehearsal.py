"""Whether PEFT computes with an adapter what its dense weights compute, tried before it is written.

PEFT wraps modules, and not all models call the modules that they have: some read a layer's weight
(and get the base's) or its stride (and crash), or have forwards that the wrapper does not know. So
random adapters are loaded into a small model of the same modules (`miniature`), and its answers
compared with those of the weights that `expand` would write, a kind of layer at a time.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Assignment, Structure, nested
from cart_plugin.compress.miniature import Miniature, miniature
from cart_plugin.errors import CartError, first_line

# Of what the kind's dense weights change: an adapter that a layer does not use is 1 off.
_TOLERANCE = 1e-3
# Of the answers: below it are the roundings of models that compute some of their steps in fp32.
_ROUNDING = 1e-6
_STRENGTH = 0.3  # of a random difference, relative to the weights
_RANK = 2

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        layers: modules that PEFT's LoRA does not work for, and why.
        saved: modules that PEFT does not work with when it stores them whole, and why.
        unseen: modules of which no answer shows whether they work.
    """

    layers: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing has failed."""
        return not self.layers and not self.saved


@dataclass(frozen=True)
class _Kind:
    """Modules that differ in their numbers only: the same layer of all blocks."""

    is_saved: bool  # stored whole, rather than given LoRA
    modules: tuple[str, ...]


class Rehearsal:
    """A model's trials, plan after plan, and what they have found so far.

    Attributes:
        layers: modules that PEFT's LoRA does not work for, and why.
        saved: modules that PEFT does not work with when it stores them whole, and why.
        as_parameters: modules that it wraps as it wraps stacked experts instead.
    """

    def __init__(self, model: Any, structure: Structure, task_type: str | None) -> None:
        """Of a model from `names.meta_model`, which is not modified."""
        self.layers: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        self.as_parameters: set[str] = set()
        self._structure = structure
        self._task_type = task_type
        self._small = miniature(model) or Miniature(model, (), frozenset(), False)
        self._unseen: list[str] = []

    def accepts(self, assignment: Assignment) -> bool:
        """Whether a plan works; if not, what does not is known now.

        Raises:
            CartError: PEFT does not take the plan, though it takes each part of it.
        """
        outcome = _rehearse(self._small, assignment, self._structure, self._task_type)
        layers = {layer.module for layer in assignment.lora.values()}
        self._unseen = [module for module in outcome.unseen if module in layers]
        if outcome.is_clean:
            outcome = _by_class(self._structure, assignment, self._unseen)
        if any(layer.is_parameter for layer in assignment.lora.values()):
            # PEFT 0.21.2 takes `gate_proj` of a dense layer for an expert's, and knows no router's
            # forward; both work as parameters, which no model without experts has any use for.
            linear = {layer.module for layer in assignment.lora.values() if layer.kind == "linear"}
            again = outcome.layers.keys() & linear
            self.as_parameters |= again
            outcome.layers = {m: why for m, why in outcome.layers.items() if m not in again}
            if again:
                return False
        self.layers |= outcome.layers
        self.saved |= outcome.saved
        return outcome.is_clean

    def notes(self, assignment: Assignment) -> list[str]:
        """What a user has to know of the trials of a plan that works."""
        found = []
        reasons: dict[tuple[str, str], list[str]] = {}
        for module, reason in self.layers.items():
            names = self._structure.below(module)
            stored = any(name in assignment.exact for name in names)
            fate = "are stored whole" if stored else "stay at the base"
            reasons.setdefault((reason, fate), []).append(module)
        for (reason, fate), modules in reasons.items():
            found.append(
                f"{len(modules)} modules such as {modules[0]} get no LoRA but {fate}: {reason}"
            )
        if not self._small.runs:
            found.append(
                "no way was found to run a small model of this architecture: PEFT loads these "
                "adapters, but nobody has seen that it answers with them as `mergekit-cart expand` "
                "does; compare the two"
            )
        elif self._unseen:
            found.append(
                f"{len(self._unseen)} modules such as {self._unseen[0]} had no part in the trial "
                "run's answers: compare PEFT's with those of `mergekit-cart expand` where they have"
            )
        return found


def _rehearse(
    small: Miniature, assignment: Assignment, structure: Structure, task_type: str | None
) -> Outcome:
    """Try a plan on a small model; without runs only what PEFT wraps and loads is tried."""
    trial = _Trial(small, assignment, structure, task_type)
    outcome = Outcome()
    together = trial.failure(assignment)
    if together is None:
        if small.runs:
            trial.compare(outcome)
        else:
            outcome.unseen = [module for kind in trial.kinds for module in kind.modules]
        return outcome
    anchor: _Kind | None = None  # PEFT wraps no model without any LoRA
    for kind in trial.kinds:
        if kind.is_saved and anchor is None:
            break  # no LoRA works: what is stored whole does not matter any more
        parts = [kind, anchor] if kind.is_saved and anchor is not None else [kind]
        reason = trial.failure(trial.part(parts))
        if reason is None:
            anchor = anchor or kind
            continue
        found = outcome.saved if kind.is_saved else outcome.layers
        found.update(dict.fromkeys(kind.modules, reason))
    if outcome.is_clean:
        raise CartError(f"PEFT cannot hold these adapters: {together}")
    return outcome


def _by_class(structure: Structure, assignment: Assignment, modules: Collection[str]) -> Outcome:
    """What the classes of some LoRA layers say, where no model's answer shows it.

    A plain layer does what its forward says; of another forward, or of an owner that reads the
    weight, PEFT knows nothing.
    """
    from transformers.pytorch_utils import Conv1D

    plain = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)}
    outcome = Outcome()
    for layer in assignment.lora.values():
        if layer.module not in modules:
            continue
        owner = structure.modules.get(layer.module.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            outcome.layers[layer.module] = "nn.MultiheadAttention reads its weight past PEFT"
        elif not layer.is_parameter and type(structure.modules[layer.module]).forward not in plain:
            outcome.layers[layer.module] = "its class has a forward that PEFT does not know"
    return outcome


class _Trial:
    """A small model, random adapters for it, and what it answers with them and without PEFT."""

    def __init__(
        self,
        small: Miniature,
        assignment: Assignment,
        structure: Structure,
        task_type: str | None,
    ) -> None:
        self.kinds = _kinds(assignment)
        self._small = small
        self._assignment = assignment
        self._structure = structure
        self._task_type = task_type
        self._state: dict[str, Tensor] = small.model.state_dict()

    def part(self, kinds: Sequence[_Kind]) -> Assignment:
        """The plan for some kinds of modules only."""
        layers = {module for kind in kinds if not kind.is_saved for module in kind.modules}
        saved = [module for kind in kinds if kind.is_saved for module in kind.modules]
        plan = self._assignment
        lora = {name: layer for name, layer in plan.lora.items() if layer.module in layers}
        inside = tuple(f"{module}." for module in saved)
        exact = {name: source for name, source in plan.exact.items() if name.startswith(inside)}
        return replace(plan, lora=nested(lora, self._structure), saved=saved, exact=exact)

    def failure(self, plan: Assignment) -> str | None:
        """Why PEFT cannot wrap, load and run a plan; None if it can."""
        try:
            model = self._wrapped(plan)
            lost = self._misplaced(model, plan)
            if lost is not None:
                return lost
            if self._small.runs:
                self._load(model, self._random(plan))
                self._answers(model.get_base_model())
        except Exception as error:  # of PEFT, or of any model's code that meets PEFT's layers
            return f"PEFT cannot run it: {first_line(error)}"
        return None

    def compare(self, outcome: Outcome) -> None:
        """Compare answers, kind by kind, and enter those that differ.

        Raises:
            CartError: they differ with all adapters at once, though with none of them alone.
        """
        model = self._wrapped(self._assignment)
        values = self._random(self._assignment)
        base = self._answers(self._small.model)
        for kind in self.kinds:
            effect, error = self._difference(model, base, self._only(kind, values))
            if error > max(_TOLERANCE * effect, _ROUNDING):
                found = outcome.saved if kind.is_saved else outcome.layers
                reason = "with PEFT the model answers otherwise than with these weights"
                found.update(dict.fromkeys(kind.modules, reason))
            elif effect <= _ROUNDING:
                outcome.unseen += kind.modules
        if outcome.is_clean:
            effect, error = self._difference(model, base, values)
            if error > max(_TOLERANCE * effect, _ROUNDING):
                raise CartError(
                    "PEFT answers otherwise with these adapters than the weights that they stand "
                    f"for, by {error / effect:.1e} of the difference; make whole models with "
                    "`mergekit-cart merge` or average, and report this architecture"
                )

    def _difference(
        self, model: Any, base: list[Tensor], values: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """How far dense weights move the answers, and how far PEFT's are from those."""
        self._load(model, values)
        adapted = self._answers(model.get_base_model())
        dense = self._dense(values)
        return _distance(dense, base, base), _distance(adapted, dense, base)

    def _wrapped(self, plan: Assignment) -> Any:
        from peft import get_peft_model

        model = self._small.model
        ranks = dict.fromkeys(plan.lora, _RANK)
        modules = self._structure.modules
        config = peft_files.lora_config(plan, ranks, modules, self._task_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without values of its own the model is on the meta device, and PEFT's layers too.
            is_empty = not self._small.runs
            return get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=is_empty).eval()

    def _misplaced(self, model: Any, plan: Assignment) -> str | None:
        """What PEFT would load of a plan's files otherwise than planned, if anything."""
        from peft import get_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = set(get_peft_model_state_dict(model, save_embedding_layers=False))
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
        """The tensors of an adapter."""
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

    def _only(self, kind: _Kind, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter that leaves all but one kind of modules as they are."""
        found = dict(values)
        for layer in self._assignment.lora.values():
            if kind.is_saved or layer.module not in kind.modules:
                for name in (peft_files.lora_name(layer, "B"), peft_files.bias_name(layer)):
                    if name in found:
                        found[name] = torch.zeros_like(found[name])
        inside = tuple(f"{module}." for module in kind.modules)
        moved = {s for n, s in self._assignment.exact.items() if n.startswith(inside)}
        for name, source in self._assignment.exact.items():
            if not kind.is_saved or source not in moved:  # tied weights move together
                found[peft_files.exact_name(name)] = self._state[source].clone()
        return found

    def _load(self, model: Any, values: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(model, dict(values))

    def _dense(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The answers of the small model itself, with the weights that an adapter stands for."""
        plan = self._resized(self._assignment)
        weights: dict[str, Tensor] = {}
        for name, layer in plan.lora.items():
            a, b = (values[peft_files.lora_name(layer, side)] for side in "AB")
            weights[name] = self._state[name] + layer.difference(a, b)
            if layer.bias is not None:
                delta = values[peft_files.bias_name(layer)]
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


def _kinds(assignment: Assignment) -> list[_Kind]:
    """LoRA layers first."""
    groups: dict[tuple[bool, str], dict[str, None]] = {}
    for layer in assignment.lora.values():
        groups.setdefault((False, _NUMBER.sub("*", layer.module)), {})[layer.module] = None
    for module in assignment.saved:
        groups.setdefault((True, _NUMBER.sub("*", module)), {})[module] = None
    return [_Kind(saved, tuple(modules)) for (saved, _), modules in groups.items()]


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
