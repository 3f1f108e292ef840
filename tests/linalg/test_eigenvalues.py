"""The largest eigenvalue alone."""

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
