"""What `cart_auto` has to know of the files: which side the inputs are on, and a rounded base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cart_plugin import CartSettings, merge_state_dicts, merge_tensors
from cart_plugin.merging.directions import directions_of
from cart_plugin.merging.tensors import matrix_shape
from tests.support import random, relative_error

AUTO = CartSettings(lambda_="auto")
NAME = "transformer.h.0.mlp.c_fc.weight"


def models(count: int, kind: str, *stack: int) -> tuple[list[Tensor], Tensor]:
    base = random(*stack, 40, 56, seed=90)
    if kind == "whole":
        return [base + 0.1 * random(*stack, 40, 56, seed=seed) for seed in range(count)], base
    rows = [random(*stack, 3, 56, seed=50 + seed) for seed in range(count)]
    return [
        base + 0.1 * random(*stack, 40, 3, seed=seed) @ row for seed, row in enumerate(rows)
    ], base


def flipped(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.mT.contiguous() for tensor in tensors]


@pytest.mark.parametrize("kind", ["whole", "adapters"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_weights_that_are_stored_turned_are_merged_by_their_inputs(
    count: int, with_base: bool, kind: str
) -> None:
    tensors, base = models(count, kind)
    given, turned = (base, base.mT.contiguous()) if with_base else (None, None)
    expected = merge_tensors(tensors, AUTO, base=given, name=NAME).mT
    found = merge_tensors(flipped(tensors), AUTO, base=turned, name=NAME, turned=True)
    assert found.is_contiguous()
    assert relative_error(found, expected) <= 1e-6
    as_stored = merge_tensors(flipped(tensors), AUTO, base=turned, name=NAME)
    assert relative_error(as_stored, expected) > 1e-3


def test_stacks_of_experts_are_turned_one_by_one() -> None:
    tensors, base = models(3, "whole", 2)
    name = "model.layers.0.mlp.experts.down_proj"
    expected = merge_tensors(tensors, AUTO, base=base, name=name).mT
    found = merge_tensors(flipped(tensors), AUTO, base=base.mT, name=name, turned=True)
    assert relative_error(found, expected) <= 1e-6


def test_a_number_for_lambda_does_not_care() -> None:
    tensors, _ = models(3, "whole")
    for settings in (CartSettings(), CartSettings(center="base")):
        found = merge_tensors(tensors, settings, base=tensors[0], name=NAME, turned=True)
        assert torch.equal(found, merge_tensors(tensors, settings, base=tensors[0], name=NAME))


def test_state_dicts_say_it_by_name() -> None:
    tensors, base = models(3, "whole")
    dicts = [{NAME: tensor.mT, "up.weight": tensor} for tensor in tensors]
    bases = {NAME: base.mT, "up.weight": base}
    merged = merge_state_dicts(dicts, AUTO, base=bases, turned={NAME})
    for name, turned in ((NAME, True), ("up.weight", False)):
        own = [one[name] for one in dicts]
        alone = merge_tensors(own, AUTO, base=bases[name], name=name, turned=turned)
        assert torch.equal(merged[name], alone)


@pytest.mark.parametrize(("count", "with_base"), [(3, True), (4, True), (3, False), (6, False)])
@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_directions_of_a_turned_weight_add_up_to_its_merge(
    kind: str, count: int, with_base: bool
) -> None:
    tensors, base = models(count, kind)
    given = base.mT if with_base else None
    parts = directions_of(flipped(tensors), AUTO, base=given, name=NAME, turned=True)
    shape = matrix_shape(NAME, parts.centre.shape)
    total = parts.centre.reshape(shape) + sum(
        (one.U * (one.S * kept)[..., None, :]) @ one.Vh
        for one, kept in zip(parts.factors, parts.kept, strict=True)
    )
    expected = merge_tensors(flipped(tensors), AUTO, base=given, name=NAME, turned=True)
    assert relative_error(total.reshape(expected.shape), expected) <= 1e-5


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("size", [0.01, 0.03])
def test_adapters_are_known_where_a_cast_has_rounded_their_base(count: int, size: float) -> None:
    """Files in fp32 that a recipe merges in bf16: both ends of each difference are rounded."""
    m, n, rank = 256, 320, 8
    base, start = 0.02 * random(m, n, seed=1), random(rank, n, seed=2)
    taus = []
    for seed in range(count):
        tau = random(m, rank, seed=10 + seed) @ (start + 0.5 * random(rank, n, seed=30 + seed))
        taus.append(size * base.norm() / tau.norm() * tau)
    exact = merge_tensors([base + tau for tau in taus], AUTO, base=base, name="w") - base
    cast, short = [(base + tau).bfloat16() for tau in taus], base.bfloat16()

    def error(base_is_rounded: bool) -> float:
        found = merge_tensors(cast, AUTO, base=short, name="w", base_is_rounded=base_is_rounded)
        return relative_error(found.float() - short.float(), exact)

    assert error(base_is_rounded=True) < 0.4
    assert error(base_is_rounded=False) > 0.7  # as whole fine-tuning
