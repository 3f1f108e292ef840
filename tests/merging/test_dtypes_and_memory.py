"""Dtypes, layouts and sizes of tensors, and the memory that a merge takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
import torch

from cart_plugin.errors import CartError
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.settings import CartSettings
from tests.merging.helpers import EXACT, versions
from tests.support import cart_formula, random, rank_deficient, relative_error, with_spectrum


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(12, 14), (12,), (0, 4), ()], ids=str)
def test_dtype_of_the_inputs_is_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = versions(*shape, dtype=dtype)
    before = [tensor.clone() for tensor in tensors]
    merged = merge_tensors(tensors)
    assert merged.dtype == dtype
    assert merged.shape == shape
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert merged.data_ptr() == 0 or merged.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_the_rounding_of_single(dtype: torch.dtype) -> None:
    tensors = versions(40, 50, dtype=dtype)
    merged = merge_tensors(tensors)
    assert torch.equal(merged, merge_tensors([tensor.float() for tensor in tensors]).to(dtype))


def test_mixed_dtypes_promote() -> None:
    half, brain, single = random(8, 8), random(8, 8, seed=1), random(8, 8, seed=2)
    mixed = [half.to(torch.float16), brain.to(torch.bfloat16)]
    assert merge_tensors([*mixed, mixed[0]]).dtype == torch.float32
    assert merge_tensors([mixed[0], mixed[0], single]).dtype == torch.float32
    assert merge_tensors([mixed[0], single, single.double()]).dtype == torch.float64


@pytest.mark.parametrize("shape", [(6,), (6, 6)], ids=str)
def test_half_values_whose_sum_overflows_are_merged(shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, 6e4, dtype=torch.float16) for _ in range(8)]
    assert torch.isinf(tensors[0] + tensors[1]).all()
    assert torch.equal(merge_tensors(tensors), tensors[0])


@pytest.mark.parametrize("shape", [(600,), (600, 600)], ids=str)
def test_large_finite_values_whose_sum_overflows_are_merged(shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, 3e38) for _ in range(3)]
    assert torch.allclose(merge_tensors(tensors), tensors[0])


def test_a_result_beyond_half_precision_is_refused() -> None:
    tensors = [4e4 * with_spectrum(rank_deficient(8, 1), 8, 8, seed=seed) for seed in range(4)]
    halves = [tensor.to(torch.float16) for tensor in tensors]
    message = "tensor 'up.weight': the merged values leave the range of torch.float16; use a wider"
    with pytest.raises(CartError, match=message):
        merge_tensors(halves, CartSettings(rank=1, lambda_=50.0), name="up.weight")


def test_gradients_are_not_recorded() -> None:
    tensors = [tensor.requires_grad_() for tensor in versions(6, 7, count=3)]
    assert not merge_tensors(tensors).requires_grad


def test_noncontiguous_inputs_are_merged() -> None:
    tensors = [tensor.mT for tensor in versions(30, 20)]
    assert relative_error(merge_tensors(tensors), cart_formula(tensors, 1)) <= 1e-5


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 5)], ids=str)
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    merged = merge_tensors([torch.zeros(shape) for _ in range(3)], name="fc.weight")
    assert merged.shape == shape


def test_equal_models_come_out_unchanged_to_the_last_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = random(30, 40, dtype=dtype)
        assert torch.equal(merge_tensors([tensor] * 4), tensor)


def peak(
    tensors: Sequence[torch.Tensor], settings: CartSettings, base: torch.Tensor | None = None
) -> int:
    """Most bytes that torch asks its allocator for while it merges, by its profiler."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        merge_tensors(tensors, settings, base=base, name="w")
    used = highest = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            used += event.nbytes()
            highest = max(highest, used)
    return highest


@pytest.mark.cpu_only  # the profiler sees its memory
def test_peak_memory_does_not_grow_with_the_number_of_models() -> None:
    assert tracemalloc.is_tracing() is False
    few, many = (
        peak(versions(256, 256, count=count, dtype=torch.bfloat16), CartSettings(svd=EXACT))
        for count in (3, 12)
    )
    assert few > 256 * 256 * 4
    assert many <= 1.1 * few


@pytest.mark.cpu_only  # the profiler sees its memory
@pytest.mark.parametrize(("m", "n"), [(256, 256), (512, 128), (128, 512)])
@pytest.mark.parametrize("count", [4, 8, 20])
def test_peak_memory_of_auto_is_within_what_it_says(m: int, n: int, count: int) -> None:
    auto = peak(versions(m, n, count=count), CartSettings(lambda_="auto", svd=EXACT))
    plain = peak(versions(m, n, count=count), CartSettings(rank_ratio=0.16, svd=EXACT))
    k = min(n, count * int(0.16 * min(m, n)))
    assert auto <= max(plain, 4 * m * n) + 4 * (2 * k * (m + n) + 2 * k**2 + 3 * m * n)
    if count * int(0.16 * min(m, n)) >= n:  # from there on, more models take no more
        more = peak(versions(m, n, count=2 * count), CartSettings(lambda_="auto", svd=EXACT))
        assert more <= 1.15 * auto


@pytest.mark.parametrize(("m", "n"), [(256, 256), (512, 128), (128, 512)])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_peak_memory_with_a_base_is_within_what_it_says(m: int, n: int, count: int) -> None:
    *tensors, base = versions(m, n, count=count + 1)
    auto = peak(tensors, CartSettings(lambda_="auto", svd=EXACT), base)
    plain = peak(versions(m, n), CartSettings(rank_ratio=0.24, svd=EXACT))
    k = min(n, count * int(0.24 * min(m, n)))
    copies = 5 if count == 4 else 4  # the other form's result beside it
    assert auto <= max(plain, 4 * m * n) + 4 * (2 * k * (m + n) + 2 * k**2 + copies * m * n)


@pytest.mark.cpu_only  # the profiler sees its memory
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("count", [6, 20, 32])
def test_peak_memory_of_adapters_is_within_what_it_says(count: int, with_base: bool) -> None:
    m, n, rank = 256, 320, 6
    base = random(m, n, seed=99)
    tensors = [
        base + random(m, rank, seed=seed) @ random(rank, n, seed=100 + seed) / 50
        for seed in range(count)
    ]
    auto = peak(tensors, CartSettings(lambda_="auto"), base if with_base else None)
    plain = peak(versions(m, n), CartSettings(rank_ratio=0.24, svd=EXACT))  # to find the changes
    # Without a base they are told by what sets them apart from one of them.
    k = min(n, count * (rank if with_base else 2 * rank))
    assert auto <= max(plain, 4 * m * n) + 4 * (4 * k * (m + n) + 40 * k**2 + 3 * m * n)
