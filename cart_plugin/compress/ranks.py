"""Ranks of all layers and tasks: by a rule, or so that a size is met with the least error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cart_plugin.compress.layers import Layer
from cart_plugin.errors import CartError
from cart_plugin.gram import eigvalsh
from cart_plugin.lowrank import RankRule
from cart_plugin.precision import full_precision

Spectra = Mapping[str, Tensor]
"""Squared singular values by the layer's name, descending, fp64; summed over stacked experts."""


def spectrum(matrices: Tensor) -> Tensor:
    """Squared singular values of ``(stack, m, n)``, summed over the stack, descending."""
    short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    total = torch.zeros(short.shape[-2], dtype=torch.float64)
    with torch.no_grad(), full_precision(matrices.device):
        for matrix in short:
            # Of entries of 1e-20 the squares leave fp32.
            largest = float(matrix.abs().max())
            if largest:
                scaled = matrix / largest
                values = eigvalsh(scaled @ scaled.mT).double().flip(0).clamp_min(0)
                total += values * largest**2
    return total


def least_rank(layer: Layer) -> int:
    """The rank below which PEFT has no place for what the layer carries.

    That is a bias; and of parameters (stacked experts) all adapters must hold the same.
    """
    return 1 if layer.bias is not None or layer.is_parameter else 0


def by_rule(layers: Sequence[Layer], rule: RankRule, spectra: Spectra) -> dict[str, int]:
    """One task's ranks by a rule.

    Args:
        layers: those that the adapter may hold.
        rule: the rule; 0 where it keeps nothing.
        spectra: needed by ``energy`` only.
    """
    ranks = {}
    for layer in layers:
        _, out, inside = layer.matrices
        rank = rule.fixed_rank(out, inside)
        if rank is None:
            rank = _energy_rank(spectra[layer.name], rule.energy or 0.0)
        ranks[layer.name] = max(rank, least_rank(layer))
    return not_empty(layers, ranks)


def not_empty(layers: Sequence[Layer], ranks: dict[str, int]) -> dict[str, int]:
    """Give the cheapest layer rank 1 where all have 0: PEFT loads no adapter without LoRA."""
    if not any(ranks.values()):
        ranks[min(layers, key=lambda layer: layer.direction).name] = 1
    return ranks


def _energy_rank(values: Tensor, energy: float) -> int:
    """As many directions as hold a share of the squared singular values; 0 of nothing."""
    total = float(values.sum())
    if total == 0:
        return 0
    # The spectra come from fp32 products: rounding must not turn "all of it" into less.
    slack = 1e-6 if energy < 1 else 0.0
    reached = values.cumsum(0) >= energy * total * (1 - slack)
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else len(values)


def by_size(
    layers: Sequence[Layer],
    spectra: Sequence[Spectra],
    itemsizes: Mapping[str, int],
    size: Callable[[Sequence[Mapping[str, int]]], int],
    target: int,
) -> list[dict[str, int]]:
    """Ranks of all tasks that meet a size with the least total squared error.

    A layer's directions are worth their squared singular values, and each costs the same bytes:
    taking them by worth per byte, over all layers and tasks, is optimal up to the last one, since
    of one layer the worth falls from each direction to the next. That is one threshold for all.

    Args:
        layers: those that the adapters may hold.
        spectra: one a task.
        itemsizes: bytes of a number, by the layer's name.
        size: bytes of everything at given ranks, with all overhead.
        target: bytes that must not be exceeded.

    Raises:
        CartError: no choice of ranks is that small.
    """
    least = {layer.name: least_rank(layer) for layer in layers}
    floor = [not_empty(layers, dict(least)) for _ in spectra]
    if size(floor) > target:
        raise CartError(
            f"the base and what is stored exactly take {size(floor):,} bytes alone, but "
            f"--target-size allows {target:,}; give a larger one"
        )
    worth, owners = _directions(layers, spectra, itemsizes, least)
    order = worth.argsort(descending=True, stable=True)
    order = order[worth[order] > 0]
    owners = owners[order]

    def ranks(count: int) -> list[dict[str, int]]:
        taken = torch.bincount(owners[:count], minlength=len(layers) * len(spectra)).tolist()
        found = [
            {
                layer.name: least[layer.name] + taken[task * len(layers) + index]
                for index, layer in enumerate(layers)
            }
            for task in range(len(spectra))
        ]
        return [not_empty(layers, chosen) for chosen in found]

    # The size grows with every direction: find the most that fit.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if size(ranks(middle)) <= target:
            low = middle
        else:
            high = middle - 1
    return ranks(low)


def _directions(
    layers: Sequence[Layer],
    spectra: Sequence[Spectra],
    itemsizes: Mapping[str, int],
    least: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """Worth per byte of every direction above the least ranks, and whose it is."""
    worths, owners = [], []
    for task, found in enumerate(spectra):
        for index, layer in enumerate(layers):
            values = found[layer.name][least[layer.name] :]
            # Rounding may leave tiny values out of order; directions come in order all the same.
            values = values.cummin(0).values if len(values) else values
            worths.append(values / (layer.direction * itemsizes[layer.name]))
            owners.append(torch.full((len(values),), task * len(layers) + index))
    return torch.cat(worths), torch.cat(owners)
