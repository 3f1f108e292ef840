"""How a tensor can be held by an adapter, as the classes of the model's modules say."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from cart_plugin.checkpoints.names import tied_names
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.tensors import is_decomposed

# PEFT's classes of classifiers store these whole: parts of one would be stored twice.
_HEADS = frozenset({"classifier", "score", "qa_outputs"})

Kind = Literal["linear", "transposed", "convolution", "parameter", "experts", "transposed experts"]


@dataclass(frozen=True)
class Layer:
    """A weight that an adapter holds as LoRA.

    Attributes:
        name: the parameter's name in the model's state dict.
        module: the module that PEFT wraps.
        kind: how the parameter becomes matrices ``(out, in)``: "linear" as it is, "transposed" is
            GPT-2's Conv1D, "convolution" flattens the kernel, "experts" is a stack, "parameter" a
            matrix that PEFT is to target as it targets stacks.
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
        if self.kind in ("linear", "parameter"):
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
        return self.kind in ("parameter", "experts", "transposed experts")

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
        if self.is_head(name) or 0 in self.state[name].shape:
            return None
        found = self.by_class(name)
        if found is None:
            return None
        if found.kind == "convolution":
            # Whatever its name says: a convolution's kernel is no stack of experts.
            return found if found.full_rank > 1 else None
        if not is_decomposed(name, found.shape):
            return None
        if found.is_parameter:
            # A stack of one, or beside layers, is no experts' (a learned query of a projector).
            is_stack = found.shape[0] > 1 and not _has_layers(self.modules[found.module])
            return found if is_stack else None
        return found

    def by_class(self, name: str) -> Layer | None:
        """How PEFT would hold a tensor by what its module is, whether it is worth it or not."""
        module, _, leaf = name.rpartition(".")
        owner = self.modules.get(module)
        shape = tuple(self.state[name].shape)
        if owner is None or not module:
            return None
        if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            plain = owner.groups == 1 and set(owner.dilation) == {1}
            if leaf != "weight" or not plain or owner.padding_mode != "zeros":
                return None
            return Layer(name, module, "convolution", shape, prefix=module)
        if leaf == "weight" and isinstance(owner, nn.Linear):
            return Layer(name, module, "linear", shape, prefix=module)
        if leaf == "weight" and type(owner).__name__ == "Conv1D":
            return Layer(name, module, "transposed", shape, prefix=module)
        if len(shape) == 3 and not isinstance(owner, ParametrizationList):
            is_transposed = bool(getattr(owner, "is_transposed", False))
            kind: Kind = "transposed experts" if is_transposed else "experts"
            return Layer(name, module, kind, shape, prefix=module)
        return None

    def as_parameter(self, name: str) -> Layer | None:
        """How PEFT holds a matrix as a parameter, whatever its module does with it; None if not.

        That way are a router's weight, which is no layer's, and matrices of layers whose names PEFT
        takes for those of experts. It takes neither biases beside it nor adapters without it.
        """
        module = name.rpartition(".")[0]
        owner = self.modules.get(module)
        shape = tuple(self.state[name].shape)
        is_table = isinstance(owner, nn.Embedding)
        if owner is None or not module or is_table or self.is_head(name) or len(shape) != 2:
            return None
        found = Layer(name, module, "parameter", shape, prefix=module)
        return found if is_decomposed(name, shape) and found.full_rank > 1 else None

    def is_head(self, name: str) -> bool:
        """Whether a tensor lies outside the model's body: a task's own head."""
        return not name.startswith(self._body)

    def below(self, module: str) -> list[str]:
        """All tensors of a module."""
        return [name for name in self.state if name.startswith(f"{module}.")]

    def holder(self, name: str) -> str | None:
        """The module that is stored whole for a tensor's sake; None if that would be too much."""
        head = name.partition(".")[0]
        if head in _HEADS and head != name and self.is_head(name):
            return head
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


def _has_layers(module: nn.Module) -> bool:
    """Whether modules below one have matrices of their own: norms and activations do not count."""
    below = (parameter for child in module.children() for parameter in child.parameters())
    return any(parameter.ndim > 1 for parameter in below)


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
