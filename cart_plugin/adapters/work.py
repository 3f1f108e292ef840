"""The merge itself, a weight at a time: read, merge within the span, cut to the rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from cart_plugin.adapters.agreement import Plan
from cart_plugin.adapters.inputs import Adapter, Shape, is_buffer
from cart_plugin.adapters.settings import Request
from cart_plugin.checkpoints import adapters as tensors
from cart_plugin.errors import CartError
from cart_plugin.linalg.threads import side_by_side
from cart_plugin.merging.inputs import agreed_buffer
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.span_measures import Answers, Overlaps, answers, overlaps
from cart_plugin.merging.spans import Span, merge_in_span, of_rank
from cart_plugin.merging.tensors import is_decomposed

# Weights in the works at once: each takes a few times the size of all adapters' factors of it.
_MOST_AT_ONCE = 8


@dataclass
class Done:
    """One merged weight.

    Attributes:
        module: PEFT's name of it.
        shape: of the weight.
        is_averaged: its tables are no linear maps: the mean, whatever the method.
        tensors: of the merged adapter, by their names in the file.
        exact: how a merge without a bound on its rank answers in the adapters' places.
        cut: how the one that is written does.
        overlaps: of the adapters.
    """

    module: str
    shape: Shape
    is_averaged: bool
    tensors: dict[str, Tensor]
    exact: Answers
    cut: Answers
    overlaps: Overlaps


class Merge:
    """A merge of adapters whose plan is made.

    Attributes:
        rank: of the merged adapter.
        full_rank: one that holds any merge of the adapters that count: their largest sum of ranks
            over the weights.
        scale: what PEFT multiplies its ``B A`` by.
        dtype: of its A and B.
    """

    def __init__(self, plan: Plan, request: Request, shares: Sequence[float]) -> None:
        """Choose rank and dtype.

        Args:
            plan: of the adapters.
            request: how.
            shares: of the plan's adapters, in its order; they sum to 1.
        """
        self.plan, self.request, self.shares = plan, request, shares
        self.kept = Kept()
        counting = [one for one, share in zip(plan.adapters, shares, strict=True) if share]
        ranks = {
            module: [one.layers[module].rank for one in counting if module in one.layers]
            for module in plan.shapes
        }
        self.full_rank = max(map(sum, ranks.values()))
        if request.rank is None:
            self.rank = max(chain.from_iterable(ranks.values()))
        else:
            self.rank = self.full_rank if request.rank == "full" else request.rank
        self.dtype = request.dtype or plan.dtype(
            lambda adapter: chain.from_iterable(
                (layer.factors.a, layer.factors.b) for layer in adapter.layers.values()
            )
        )
        self.work_dtype = torch.promote_types(self.dtype, torch.float32)
        self._only = self._kept_as_it_is()
        self.scale = 1.0 if self._only is None else self._scale_of(self._only)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the merged adapter's tensors, by their names."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for module, shape in self.plan.shapes.items():
            a, b, bias = self._names(module)
            for name, side in zip((a, b), shape.lora(self.rank), strict=True):
                found[name] = (self.dtype, side)
            if bias is not None:
                found[bias] = (self.dtype, (shape.m,))
        for key, name in self.plan.whole.items():
            found[name] = (self._whole_dtype(key), self.plan.holders(key)[0].held(key).shape)
        return found

    def _kept_as_it_is(self) -> Adapter | None:
        """The one adapter that counts, if the rank leaves room for it."""
        adapters = zip(self.plan.adapters, self.shares, strict=True)
        first, *others = [adapter for adapter, share in adapters if share]
        room = max(layer.rank for layer in first.layers.values()) <= self.rank
        return first if room and not others else None

    def _scale_of(self, adapter: Adapter) -> float:
        """That of all its layers; 1, with the scale in B, if they differ or no whole alpha fits."""
        scales = {layer.scale for layer in adapter.layers.values()}
        alpha = self.rank * max(scales)
        is_whole = alpha >= 1 and math.isclose(alpha, round(alpha), rel_tol=1e-9)
        return max(scales) if len(scales) == 1 and is_whole else 1.0

    def is_decomposed(self, module: str) -> bool:
        """Whether the method decides of a weight; tables of tokens are averaged."""
        shape, name = self.plan.shapes[module], f"{tensors.plain_name(module)}.weight"
        return shape.kind != "embedding" and is_decomposed(name, shape.of_weight)

    def _names(self, module: str) -> tuple[str, str, str | None]:
        """The names in the file of a module's A and B, and of B's bias."""
        factors = next(
            adapter.layers[module].factors
            for adapter in self.plan.adapters
            if module in adapter.layers
        )
        can = self.plan.has_bias and self.plan.shapes[module].kind in ("linear", "convolution")
        bias = f"{factors.b.removesuffix('.weight')}.bias" if can else None
        return factors.a, factors.b, bias

    def _whole_dtype(self, key: str) -> torch.dtype:
        own = self.plan.dtype(lambda adapter: [adapter.whole[key]] if key in adapter.whole else [])
        return self.request.dtype or own if own.is_floating_point else own

    def weights(self, take: Callable[[Done], None]) -> None:
        """Merge all weights.

        Each by one thread, as many at once as torch has threads: the matrices are too small for
        several to gain on one, and the result does not depend on their number.

        Args:
            take: is given one after the other, in the plan's order.

        Raises:
            CartError: a tensor that cannot be merged, or an adapter that changes nothing.
        """
        changes = [0.0] * len(self.plan.adapters)

        for done in side_by_side(self._merged, list(self.plan.shapes), _MOST_AT_ONCE, threads=1):
            for index, own in enumerate(done.cut.own.tolist()):
                changes[index] += own
            take(done)
        for adapter, change in zip(self.plan.adapters, changes, strict=True):
            if change == 0:
                raise CartError(
                    f"adapter {adapter.name} changes nothing: all its B (or A, or its lora_alpha) "
                    "are zero, as before training; leave it out, or name the folder of the trained "
                    "one"
                )

    def _merged(self, module: str) -> Done:
        shape, shares = self.plan.shapes[module], self.shares
        span = Span(
            [adapter.difference(module, shape, self.work_dtype) for adapter in self.plan.adapters]
        )
        decomposed = self.is_decomposed(module)
        settings = self.request.settings if decomposed else None
        merged = merge_in_span(span, shares, settings, name=module, kept=self.kept)
        found = of_rank(merged, self.rank)
        if self._only is None:
            factors = span.lifted(found)
        else:
            factors = self._only.difference(module, shape, self.work_dtype, self.scale)
        a, b, bias = self._names(module)
        held = dict(zip((a, b), shape.to_lora(factors, self.rank), strict=True))
        if bias is not None:
            held[bias] = self._bias(module, shape)
        return Done(
            module,
            shape,
            not decomposed and self.request.settings is not None,
            {name: self._stored(name, tensor, self.dtype) for name, tensor in held.items()},
            answers(span.parts, merged.total),
            answers(span.parts, found.dense()),
            overlaps(span.parts),
        )

    def _bias(self, module: str, shape: Shape) -> Tensor:
        total = torch.zeros(shape.m, dtype=self.work_dtype, device="cpu")
        for adapter, share in zip(self.plan.adapters, self.shares, strict=True):
            found = adapter.bias(module, shape, self.scale)
            if found is not None:
                total.add_(found, alpha=share)
        return total

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The means of the tensors that take the place of the base's.

        Raises:
            CartError: values that are not finite, or leave the dtype's range.
        """
        shares = {
            adapter.name: share
            for adapter, share in zip(self.plan.adapters, self.shares, strict=True)
        }
        for key, name in self.plan.whole.items():
            first, *others = holders = self.plan.holders(key)
            if is_buffer(first.held(key)):
                dtype = self._whole_dtype(key)
                held = [holder.checkpoint.read(holder.whole[key]).to(dtype) for holder in holders]
                yield name, agreed_buffer(held, [holder.name for holder in holders], name)
                continue
            total = first.read(first.whole[key])
            if len(others) + 1 == len(shares):  # else one table, wherever it is
                total = total * shares[first.name]
                for adapter in others:
                    total.add_(adapter.read(adapter.whole[key]), alpha=shares[adapter.name])
            yield name, self._stored(name, total, self._whole_dtype(key))

    def _stored(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        found = tensor.to(dtype).contiguous()
        if not bool(torch.isfinite(found).all()):
            ways = ["dtype float32 or bfloat16"] if dtype == torch.float16 else []
            ways += ["a smaller lambda"] if self.request.method == "cart" else []
            raise CartError(
                f"tensor {name!r}: the merged values leave the range of {dtype}"
                + (f"; take {' or '.join(ways)}" if ways else "")
            )
        return found
