"""The adapters that are merged: what each changes, and what has to be alike in them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cart_plugin.adapters import kinds
from cart_plugin.checkpoints import adapters as tensors
from cart_plugin.checkpoints import hub
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import (
    ADAPTER_CONFIG,
    CONFIG,
    Checkpoint,
    open_adapter,
    read_config,
)
from cart_plugin.errors import CartError
from cart_plugin.merging.inputs import check_finite
from cart_plugin.merging.spans import Difference

Kind = Literal["linear", "embedding", "convolution", "experts"]
_AGAIN = "copy the adapter again, or save it with PEFT's save_pretrained"


@dataclass(frozen=True)
class Shape:
    """A weight that adapters change, as matrices.

    Attributes:
        kind: "embedding" is a table of ``n`` rows, "convolution" flattens the kernel, "experts" is
            a stack of matrices in one parameter.
        stack: number of matrices; 1 but for experts.
        m: outputs.
        n: inputs.
        kernel: of a convolution: input channels and the kernel's sides.
    """

    kind: Kind
    stack: int
    m: int
    n: int
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        matrix = f"{self.m} x {self.n}"
        return f"{self.stack} matrices {matrix}" if self.stack > 1 else f"{self.kind} {matrix}"

    @property
    def of_weight(self) -> tuple[int, ...]:
        """As `cart_plugin.merging.tensors.is_decomposed` takes it."""
        return (self.m, self.n) if self.stack == 1 else (self.stack, self.m, self.n)

    def lora(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        if self.kind == "convolution":
            return (rank, *self.kernel), (self.m, rank, *(1 for _ in self.kernel[1:]))
        return (self.stack * rank, self.n), (self.m, self.stack * rank)

    def to_lora(self, found: Difference, rank: int) -> tuple[Tensor, Tensor]:
        """A and B of a difference of at most a rank, with zeros for what it has less."""
        lacking = rank - found.left.shape[-1]
        left = torch.nn.functional.pad(found.left, (0, lacking))
        right = torch.nn.functional.pad(found.right, (0, 0, 0, lacking))
        a, b = self.lora(rank)
        return right.reshape(a), left.permute(1, 2, 0).reshape(b)


@dataclass(frozen=True)
class Layer:
    """A weight that one adapter changes.

    Attributes:
        factors: the names of its tensors.
        shape: of the weight.
        rank: of each of its matrices.
        scale: of ``B A``.
    """

    factors: tensors.Factors
    shape: Shape
    rank: int
    scale: float


@dataclass
class Adapter:
    """An adapter.

    Attributes:
        checkpoint: its config, and its tensors.
        layers: what it changes, by PEFT's names of modules.
        whole: names in its file of tensors that take the place of the base's, by what is one in all
            adapters: PEFT calls a bias otherwise where its module has LoRA.
    """

    checkpoint: Checkpoint
    layers: dict[str, Layer] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        return self.checkpoint.name

    def held(self, key: str) -> TensorInfo:
        """What is said in its file of a tensor that takes the place of the base's."""
        return self.checkpoint.tensors[self.whole[key]]

    def read(self, tensor: str) -> Tensor:
        """A tensor, checked to be finite, in fp32 or better.

        Raises:
            CartError: it cannot be read, or holds NaN or infinite values.
        """
        found = self.checkpoint.read(tensor)
        check_finite(found, [f"adapter {self.name}"], [found], f"tensor {tensor!r}")
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def difference(
        self, module: str, shape: Shape, dtype: torch.dtype, scale: float = 1.0
    ) -> Difference:
        """What it changes of a weight, over a scale; of rank 0 where it does not.

        Raises:
            CartError: as `read`.
        """
        layer = self.layers.get(module)
        if layer is None:
            empty = torch.empty(shape.stack, shape.m, 0, dtype=dtype, device="cpu")
            return Difference(empty, empty.new_empty(shape.stack, 0, shape.n))
        a, b = (self.read(name).to(dtype) for name in (layer.factors.a, layer.factors.b))
        left = b.reshape(shape.m, layer.rank, shape.stack).permute(2, 0, 1) * (layer.scale / scale)
        return Difference(left, a.reshape(shape.stack, layer.rank, shape.n))

    def bias(self, module: str, shape: Shape, scale: float = 1.0) -> Tensor | None:
        """What it adds to a layer's bias, over a scale; None for nothing.

        Raises:
            CartError: as `read`.
        """
        layer = self.layers.get(module)
        if layer is None or layer.factors.bias is None:
            return None
        return self.read(layer.factors.bias).reshape(shape.m) * (layer.scale / scale)


def find(paths: Sequence[str | Path]) -> list[Path]:
    """The folders of adapters, which are named by these, or by their names on the hub.

    Raises:
        CartError: one is neither here nor in the hub's cache, or is given twice.
    """
    folders = [_folder(path) for path in paths]
    seen: dict[str, str | Path] = {}
    for path, folder in zip(paths, folders, strict=True):
        place = os.path.realpath(folder)
        if place in seen:
            raise CartError(
                f"{seen[place]} and {path} are one folder: the adapter would count twice; name it "
                "once (weights make it count more)"
            )
        seen[place] = path
    return folders


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not str(path).strip():
        raise CartError("an adapter's name is empty; name its folder")
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:
        raise CartError(f"adapter {path}: {error.strerror}") from None
    if is_folder:
        if not (folder / ADAPTER_CONFIG).exists() and (folder / CONFIG).exists():
            raise CartError(
                f"{path} is a whole model and no adapter: it has {CONFIG} and no {ADAPTER_CONFIG}; "
                "merge whole models with `mergekit-cart merge`"
            )
        inside = sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
        if inside and not (folder / ADAPTER_CONFIG).exists():
            held = ", ".join(str(file.parent) for file in inside[:3])
            raise CartError(f"{path} is no adapter, but holds some; name {held}")
        return folder
    if is_there and folder.suffix in (".yaml", ".yml"):
        raise CartError(f"{path} is a recipe, which lists all adapters; name it alone")
    if is_there:
        raise CartError(f"{path} is a file; name the folder that holds it")
    found = hub.cached(str(path))
    if found is None:
        raise CartError(
            f"adapter {path} is no folder here, nor in the hub's cache; correct the path, or "
            f"download it first ({hub.download(str(path))})"
        )
    return found


def open_adapters(folders: Sequence[Path], names: Sequence[str]) -> list[Adapter]:
    """What the adapters of some folders change.

    Raises:
        CartError: as `sorted_adapter`; one cannot be read; or `compress` has made two of them
            around different bases, whatever the path in their configs.
    """
    opened = []
    bases: dict[object, str] = {}
    for folder, name in zip(folders, names, strict=True):
        opened.append(sorted_adapter(open_adapter(folder, name)))
        if (folder / tensors.BASE_RECORD).is_file():
            record = read_config(folder, f"adapter {name}", tensors.BASE_RECORD)
            bases.setdefault(str(record.get("digest")), name)
    if len(bases) > 1:
        first, other = list(bases.values())[:2]
        raise CartError(
            f"`mergekit-cart compress` has made adapters {first} and {other} around different "
            f"bases ({tensors.BASE_RECORD} of each has its digest); compress all models at once, "
            "or merge them whole (`mergekit-cart merge`)"
        )
    return opened


def is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor holds integers: positions, or the batches that a BatchNorm has counted."""
    return info.dtype is not None and not (info.dtype.is_floating_point or info.dtype.is_complex)


def sorted_adapter(checkpoint: Checkpoint, lacking: str = _AGAIN) -> Adapter:
    """What an adapter changes.

    Args:
        checkpoint: its config, and its tensors' names, shapes and dtypes.
        lacking: what to do about one without factors.

    Raises:
        CartError: it is no plain LoRA, or its tensors do not fit each other or its config.
    """
    name, config = checkpoint.name, checkpoint.config
    kinds.check_kind(name, config)
    found = tensors.sort(checkpoint.tensors)
    if found.others:
        more = f" and {len(found.others) - 1:,} more" if len(found.others) > 1 else ""
        raise CartError(
            f"adapter {name} holds {found.others[0]}{more}, which is no part of a plain LoRA, or "
            f"one factor without its other; {_AGAIN}"
        )
    of_lora = {tensor for own in found.factors for tensor in (own.a, own.b, own.bias)}
    for tensor, info in checkpoint.tensors.items():
        if not (info.is_floating or (is_buffer(info) and tensor not in of_lora)):
            what = "quantised adapters" if tensor in of_lora else "such values"
            raise CartError(
                f"adapter {name}: tensor {tensor!r} is {info.stored or info.dtype}; {what} cannot "
                "be merged, save it as bfloat16"
            )
        if 0 in info.shape:
            raise CartError(
                f"adapter {name}: tensor {tensor!r} is empty {info.shape}: its parts were not "
                "gathered when it was saved (DeepSpeed, FSDP); save it again"
            )
    if not found.factors:
        raise CartError(f"adapter {name} holds no LoRA factors; {lacking}")
    strange = [key for key in checkpoint.tensors if not key.startswith(tensors.PREFIX)]
    if strange:
        raise CartError(
            f"adapter {name}: PEFT does not load {strange[0]}, whose name does not start with "
            f"{tensors.PREFIX}; {_AGAIN}"
        )
    adapter = Adapter(checkpoint, whole={_key(tensor): tensor for tensor in found.whole})
    for factors in found.factors:
        adapter.layers[factors.module] = _layer(checkpoint, factors)
    return adapter


def _key(tensor: str) -> str:
    return tensors.plain_name(tensor) if tensor.endswith(".bias") else tensor


def _layer(checkpoint: Checkpoint, factors: tensors.Factors) -> Layer:
    name, config = checkpoint.name, checkpoint.config
    a, b = (checkpoint.tensors[tensor].shape for tensor in (factors.a, factors.b))
    plain = tensors.plain_name(factors.module)
    kind: Kind = "linear"
    stack, rank = 1, a[0]
    kernel: tuple[int, ...] = ()
    fits = len(a) == len(b) >= 2 and b[1] == rank and all(side == 1 for side in b[2:])
    if tensors.is_of_parameter(factors.module, config):
        rank, scale = kinds.of_parameters(name, config, plain)
        kind, stack = "experts", a[0] // rank
        fits = fits and len(a) == 2 and a[0] % rank == 0
    elif factors.is_embedding:
        kind = "embedding"
        fits = fits and len(a) == 2
    elif len(a) > 2:
        kind, kernel = "convolution", a[1:]
    if kind == "convolution" and len(b) == len(a) and 0 < b[1] < rank and rank % b[1] == 0:
        raise CartError(
            f"adapter {name}: {plain} is a convolution of {rank // b[1]} groups, each of which has "
            f"a part of B; {kinds.WHOLE}"
        )
    if not fits:
        raise CartError(
            f"adapter {name}: the factors of {plain} do not fit each other: A is {a}, B is {b}; "
            f"{_AGAIN}"
        )
    if kind != "experts":
        # The output of nn.MultiheadAttention has its rank and alpha, whatever patterns say of it.
        wrapped = factors.module.partition(".base_layer.")[0]
        scale = kinds.scale(name, config, tensors.plain_name(wrapped), rank)
    shape = Shape(kind, stack, b[0], math.prod(a[1:]), kernel)
    return Layer(factors, shape, rank, scale)
