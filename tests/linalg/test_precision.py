"""The switches that let products round to TF32 or bf16: off while work is under way, then back."""

from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision
from tests.support import random

DEVICE = torch.device("cpu")


@pytest.fixture
def matmul() -> Iterator[Any]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = before


@pytest.fixture
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_products_are_full_fp32_meanwhile_and_as_before_after(matmul) -> None:
    with full_precision(DEVICE):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_the_switch_comes_back_after_an_error(matmul) -> None:
    with pytest.raises(RuntimeError, match="inside"), full_precision(DEVICE):
        raise RuntimeError("inside")
    assert matmul.fp32_precision == "tf32"


def test_the_last_of_several_threads_puts_it_back(matmul) -> None:
    inside, first_out = Barrier(2), Barrier(2)
    seen = []

    def first() -> None:
        with full_precision(DEVICE):
            inside.wait()
        first_out.wait()

    def second() -> None:
        with full_precision(DEVICE):
            inside.wait()
            first_out.wait()
            seen.append(matmul.fp32_precision)

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["ieee"]
    assert matmul.fp32_precision == "tf32"


def test_recombination_is_full_fp32_too(matmul, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    addmm_ = torch.Tensor.addmm_

    def spy(*arguments: Any, **settings: Any) -> torch.Tensor:
        seen.append(matmul.fp32_precision)
        return addmm_(*arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    factors = LowRank(random(4, 2), torch.ones(2), random(2, 5))
    factors.add_to_(torch.zeros(4, 5))
    assert seen == ["ieee"]


def tensors() -> list[torch.Tensor]:
    return [random(96, 128, seed=seed) for seed in range(4)]


def test_a_program_that_allows_less_precision_gets_the_same_merge(medium) -> None:
    merged = merge_tensors(tensors(), CartSettings(rank=8))
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(merged, merge_tensors(tensors(), CartSettings(rank=8)))


def test_autocast_does_not_reach_the_merge() -> None:
    expected = merge_tensors(tensors(), CartSettings(rank=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = merge_tensors(tensors(), CartSettings(rank=8))
    assert merged.dtype == torch.float32
    assert torch.equal(merged, expected)
