"""What becomes of each tensor: LoRA, a bias beside it, a module stored whole, or nothing.

Decided by the classes of the model's modules, and by what PEFT can hold: it must load the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from cart_plugin.checkpoints.names import tied_names
from cart_plugin.errors import CartError
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.tensors import is_decomposed

Kind = Literal["linear", "transposed", "convolution", "experts", "transposed experts"]


@dataclass(frozen=True)
class Layer:
    """A weight that an adapter holds as LoRA.

    Attributes:
        name: the parameter's name in the model's state dict.
        module: the module that PEFT wraps.
        kind: how the parameter becomes matrices ``(out, in)``: "linear" as it is, "transposed" is
            GPT-2's Conv1D, "convolution" flattens the kernel, "experts" is a stack.
        shape: of the parameter.
        bias: name of the bias whose difference travels with the adapter, if any.
        prefix: PEFT's name of what holds `lora_A` and `lora_B`.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, ...]
    bias: str | None = None
    prefix: str = ""

    @property
    def matrices(self) -> tuple[int, int, int]:
        """``(stack, out, in)``."""
        if self.kind == "linear":
            return 1, self.shape[0], self.shape[1]
        if self.kind == "transposed":
            return 1, self.shape[1], self.shape[0]
        if self.kind == "convolution":
            return 1, self.shape[0], math.prod(self.shape[1:])
        stack, first, second = self.shape
        return (stack, first, second) if self.kind == "experts" else (stack, second, first)

    @property
    def full_rank(self) -> int:
        """The rank that loses nothing."""
        return min(self.matrices[1:])

    @property
    def direction(self) -> int:
        """Numbers that one more rank costs."""
        stack, out, inside = self.matrices
        return stack * (out + inside)

    @property
    def least_rank(self) -> int:
        """The rank below which PEFT has no place for what the layer carries.

        That is a bias; and of parameters (stacked experts) all adapters must hold the same.
        """
        return 1 if self.bias is not None or self.is_parameter else 0

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT targets the parameter itself rather than its module."""
        return self.kind in ("experts", "transposed experts")

    def to_matrices(self, weight: Tensor) -> Tensor:
        """The parameter as ``(stack, out, in)``, a view."""
        if self.kind == "transposed":
            return weight.mT[None]
        if self.kind == "transposed experts":
            return weight.mT
        return weight.reshape(self.matrices)

    def to_lora(self, factors: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """PEFT's A and B of factors ``(stack, out, in)``.

        Each takes the root of the singular values: then both have entries of like size, and
        rounding costs the least.
        """
        root = factors.S.sqrt()
        a = (root[..., :, None] * factors.Vh).to(dtype)  # (stack, rank, in)
        b = (factors.U * root[..., None, :]).to(dtype)  # (stack, out, rank)
        _, out, inside = self.matrices
        if self.is_parameter:
            return a.reshape(-1, inside), b.permute(1, 2, 0).reshape(out, -1).contiguous()
        shape_a, shape_b = self.lora_shapes(factors.rank)
        return a.reshape(shape_a).contiguous(), b.reshape(shape_b).contiguous()

    def lora_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at a rank."""
        stack, out, inside = self.matrices
        if self.kind == "convolution":
            return (rank, *self.shape[1:]), (out, rank, *(1 for _ in self.shape[2:]))
        return (stack * rank, inside), (out, stack * rank)

    def difference(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in fp32 or better, in the parameter's shape."""
        stack, out, inside = self.matrices
        work = torch.promote_types(a.dtype, torch.float32)
        left = b.to(work).reshape(out, -1, stack).permute(2, 0, 1)
        found = left @ a.to(work).reshape(stack, -1, inside)
        if self.kind == "transposed":
            return found[0].mT
        if self.kind == "transposed experts":
            return found.mT
        return found.reshape(self.shape)


@dataclass
class Assignment:
    """What becomes of the tensors in which models differ from the base.

    Attributes:
        lora: by the parameter's name, in the model's order.
        saved: modules that adapters hold whole.
        beside: the tensors that are stored beside LoRA because models differ in them.
        exact: the saved modules' tensors, by the names in the file: with tied weights several.
        left: tensors that stay at the base, and why.
    """

    lora: dict[str, Layer] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    beside: set[str] = field(default_factory=set)
    exact: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def has_bias(self) -> bool:
        """Whether any bias travels with its layer."""
        return any(layer.bias is not None for layer in self.lora.values())


class Structure:
    """The modules of a model without values, as far as adapters care."""

    def __init__(self, model: Any, stored: Collection[str]) -> None:
        """Look at a model from `names.meta_model`, of which ``stored`` tensors have values."""
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.state: dict[str, Tensor] = model.state_dict()
        self.tied: dict[str, list[str]] = tied_names(model)
        # Of tied names, the one whose values count: the first that the checkpoint has.
        self.stored = set(stored)
        for same in self.tied.values():
            held = [name for name in same if name in self.stored]
            self.stored.difference_update(held[1:])
        has_heads = model.base_model is not model
        self._body = f"{model.base_model_prefix}." if has_heads else ""

    def layer(self, name: str) -> Layer | None:
        """How LoRA holds a tensor, or None if it does not."""
        module, _, leaf = name.rpartition(".")
        owner = self.modules.get(module)
        shape = tuple(self.state[name].shape)
        if owner is None or not module or self.is_head(name) or 0 in shape:
            return None
        # Whatever its name says: a convolution's kernel is no stack of experts.
        if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            plain = owner.groups == 1 and set(owner.dilation) == {1}
            if leaf != "weight" or not plain or owner.padding_mode != "zeros":
                return None
            found = Layer(name, module, "convolution", shape, prefix=module)
            return found if found.full_rank > 1 else None
        if not is_decomposed(name, shape):
            return None
        if leaf == "weight" and isinstance(owner, nn.Linear):
            return Layer(name, module, "linear", shape, prefix=module)
        if leaf == "weight" and type(owner).__name__ == "Conv1D":
            return Layer(name, module, "transposed", shape, prefix=module)
        if len(shape) == 3 and not isinstance(owner, ParametrizationList):
            is_transposed = bool(getattr(owner, "is_transposed", False))
            kind: Kind = "transposed experts" if is_transposed else "experts"
            return Layer(name, module, kind, shape, prefix=module)
        return None

    def is_head(self, name: str) -> bool:
        """Whether a tensor lies outside the model's body: a task's own head."""
        return not name.startswith(self._body)

    def below(self, module: str) -> list[str]:
        """All tensors of a module."""
        return [name for name in self.state if name.startswith(f"{module}.")]

    def holder(self, name: str) -> str | None:
        """The module that is stored whole for a tensor's sake; None if that would be too much."""
        # A parametrised weight, such as weight-norm's two factors, belongs to the layer above.
        module = name.partition(".parametrizations.")[0]
        if module == name:
            module = name.rpartition(".")[0]
        inside = [
            found for path, found in self.modules.items() if f"{path}.".startswith(f"{module}.")
        ]
        # A parameter of its own of a module that holds the layers costs the whole model.
        if not module or any(
            isinstance(found, nn.ModuleList) and not isinstance(found, ParametrizationList)
            for found in inside
        ):
            return None
        return module

    def twins(self, name: str) -> list[str]:
        """The tied names of a tensor, itself the first."""
        for same in self.tied.values():
            if name in same:
                return [name, *(other for other in same if other != name)]
        return [name]


def assign(
    structure: Structure,
    changed: Collection[str],
    *,
    drop_small: bool,
    small_error: float,
    errors: Mapping[str, float],
    refused: Mapping[str, str],
    unsaved: Mapping[str, str],
) -> Assignment:
    """Decide what becomes of the tensors in which models differ from the base.

    Args:
        structure: the model's.
        changed: names, in the model's state dict, of the tensors in which models differ
            from the base.
        drop_small: leave all but LoRA layers as the base has them.
        small_error: leave those of them whose error is at most this, but for tensors of modules
            that another tensor has stored whole.
        errors: largest relative difference from the base, of the tensors for which it is known.
        refused: modules that PEFT's LoRA does not work for, and why.
        unsaved: modules that PEFT cannot store whole, and why.

    Raises:
        CartError: modules stored whole would leave nothing to LoRA.
    """
    found = Assignment()
    changed = [name for name in structure.state if name in changed and name in structure.stored]
    candidates = {}
    for name in structure.state:
        layer = structure.layer(name)
        if name in structure.stored and layer is not None and layer.module not in refused:
            candidates[name] = layer
    biases = {
        f"{layer.module}.bias": name
        for name, layer in candidates.items()
        if not layer.is_parameter and f"{layer.module}.bias" in structure.state
    }
    experts = any(layer.is_parameter for name, layer in candidates.items() if name in changed)
    lora: dict[str, Layer] = {name: candidates[name] for name in changed if name in candidates}
    whole: dict[str, list[str]] = {}
    small = {name for name in changed if errors.get(name, math.inf) <= small_error}
    within = f"within --small-error {small_error:g} of the base"
    for name in changed:
        if name in lora:
            continue
        if drop_small:
            why = refused.get(name.rpartition(".")[0])
            found.left[name] = f"--drop-small; no LoRA: {why}" if why else "--drop-small"
        elif name in biases and experts:
            found.left[name] = "PEFT holds no biases beside LoRA of stacked experts"
        elif name in biases and name in small:
            found.left[name] = within
        elif name in biases:
            weight = biases[name]
            lora[weight] = replace(candidates[weight], bias=name)
        else:
            module = structure.holder(name)
            if module is None:
                found.left[name] = "its module holds the model's layers, too large to store"
            else:
                whole.setdefault(module, []).append(name)
    for module in [module for module, names in whole.items() if small.issuperset(names)]:
        found.left.update(dict.fromkeys(whole.pop(module), within))
    _save(structure, whole, lora, unsaved, found)
    found.beside = {name for names in whole.values() for name in names} - found.left.keys()
    found.beside |= {layer.bias for layer in lora.values() if layer.bias is not None}
    if not lora and found.saved and candidates:
        # Models that differ in what is stored whole only: PEFT loads no adapter without LoRA.
        free = [
            layer
            for layer in candidates.values()
            if not layer.is_parameter and layer.name not in found.exact
        ]
        if not free:
            raise CartError(
                "all matrices lie in modules that are stored whole for other tensors' sake, and "
                "PEFT loads no adapter without LoRA; leave those tensors out with --drop-small "
                "(drop_small)"
            )
        placeholder = min(free, key=lambda layer: layer.direction)
        lora[placeholder.name] = placeholder
    ordered = {name: lora[name] for name in structure.state if name in lora}
    found.lora = nested(ordered, structure)
    return found


def _save(
    structure: Structure,
    whole: dict[str, list[str]],
    lora: dict[str, Layer],
    unsaved: Mapping[str, str],
    found: Assignment,
) -> None:
    """Fix the modules to be saved; those that cannot be stay at the base."""
    for module in sorted(whole, key=len):
        if any(f"{module}.".startswith(f"{outer}.") for outer in found.saved):
            continue
        holders = _holders(structure, module)
        reason = _obstacle(structure, holders, lora, unsaved)
        if reason:
            for name in whole[module]:
                found.left[name] = reason
            continue
        found.saved += sorted(_matched(structure, holders))
    found.saved = _outermost(found.saved)
    for module in found.saved:
        for name in structure.below(module):
            lora.pop(name, None)
            found.left.pop(name, None)
            source = next(twin for twin in structure.twins(name) if twin in structure.stored)
            found.exact[name] = source


def _holders(structure: Structure, module: str) -> list[str]:
    """A module and those that have to be saved with it: tied tensors bring theirs."""
    found = {module}
    new = [module]
    while new:
        names = structure.below(new.pop())
        tied = {twin.rpartition(".")[0] for name in names for twin in structure.twins(name)[1:]}
        new += tied - found
        found |= tied
    return _outermost(sorted(found))


def _outermost(modules: list[str]) -> list[str]:
    """Those of some modules that lie in no other of them."""
    outer = tuple(f"{module}." for module in modules)
    return [module for module in modules if not module.startswith(outer)]


def _matched(structure: Structure, modules: Collection[str]) -> set[str]:
    """The modules that PEFT takes for those named: whatever ends like them."""
    return {path for path in structure.modules if path and path.endswith(tuple(modules))}


def _obstacle(
    structure: Structure,
    holders: Collection[str],
    lora: dict[str, Layer],
    unsaved: Mapping[str, str],
) -> str:
    """Why PEFT cannot store modules whole; empty if it can."""
    matched = _matched(structure, holders)
    for module in matched:
        if module in unsaved:
            return unsaved[module]
        inner = next((path for path in matched if path.startswith(f"{module}.")), None)
        if inner is not None:
            # Such as ViTModel's `embeddings` and its `embeddings.patch_embeddings`. No name says
            # which: PEFT 0.21.2 compares the ends of names that lack its `base_model.model.`.
            return f"PEFT would store {inner} twice: its name ends like that of {module}"
        for name in structure.below(module):
            if not any(twin in structure.stored for twin in structure.twins(name)):
                return f"the models lack {name}, which PEFT would store with it"
        if isinstance(structure.modules[module], (nn.ModuleList, nn.ModuleDict)):
            return f"PEFT would take {module} for it"
    inside = tuple(f"{module}." for module in holders)
    experts = any(layer.is_parameter for layer in lora.values())
    for layer in lora.values():
        if experts and layer.name.startswith(inside):
            # Such as gpt-oss's experts, which are nearly the whole model, for their biases; and
            # its attention for the sinks: of layers with experts no bias is stored either.
            return "its module holds matrices, too large to store beside stacked experts"
        # PEFT takes the names for regular expressions that match anywhere in a path.
        hit = any(re.match(rf"(^|.*\.){module}($|\..*)", layer.module) for module in matched)
        if hit and not layer.name.startswith(inside):
            return f"PEFT would take {layer.module} for it"
    return ""


def nested(layers: dict[str, Layer], structure: Structure) -> dict[str, Layer]:
    """The layers with PEFT's names for parameters of one module: its wrappers are nested.

    The first parameter's wrapper is the innermost.
    """
    by_module: dict[str, list[Layer]] = {}
    for layer in layers.values():
        if layer.is_parameter:
            by_module.setdefault(layer.module, []).append(layer)
    found = dict(layers)
    for module, inside in by_module.items():
        order = [f"{module}.{leaf}" for leaf, _ in structure.modules[module].named_parameters()]
        inside.sort(key=lambda layer: order.index(layer.name))
        for depth, layer in enumerate(reversed(inside)):
            found[layer.name] = replace(layer, prefix=module + ".base_layer" * depth)
    return found
