"""The largest eigenvalue alone, and small decompositions on devices."""

from __future__ import annotations

import pytest
import torch

from cart_plugin.linalg import gram
from tests.support import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 8, 63, 64, 200])
def test_the_largest_eigenvalue_is_lapacks(m: int, dtype: torch.dtype) -> None:
    x = random(3, m, m + 5, dtype=dtype)
    products = x @ x.mT
    products[1] = 0
    found = gram.largest_eigenvalue(products)
    expected = torch.linalg.eigvalsh(products.double())[..., -1]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=10 * torch.finfo(dtype).eps)
    assert found[1] == 0


def test_values_that_come_many_times_and_few_directions() -> None:
    for diagonal in (torch.ones(100), torch.cat([torch.full((3,), 2.0), torch.zeros(97)])):
        assert gram.largest_eigenvalue(diagonal.diag()) == pytest.approx(float(diagonal.max()))


def test_small_svds_are_in_fp64_where_fp32_is_not_to_be_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = random(2, 6, 9)
    asked: list[torch.dtype] = []
    lapack = torch.linalg.svd

    def counted(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        asked.append(matrix.dtype)
        return tuple(lapack(matrix, full_matrices=full_matrices))

    monkeypatch.setattr(torch.linalg, "svd", counted)
    u, s, vh = gram.svd_of_small(x)
    monkeypatch.setattr(gram, "_on_device", torch.Tensor.double)  # as on a GPU
    there = gram.svd_of_small(x)
    assert asked == [torch.float32, torch.float64]
    assert {one.dtype for one in there} == {torch.float32}
    assert torch.allclose((u * s[:, None]) @ vh, x, atol=1e-5)
    assert torch.allclose((there[0] * there[1][:, None]) @ there[2], x, atol=1e-5)
