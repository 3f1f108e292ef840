"""The switch for TF32: off while CUDA work is under way, then as it was."""

from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from cart_plugin.precision import full_precision

CUDA = torch.device("cuda")


@pytest.fixture
def matmul() -> Iterator[Any]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = before


def test_products_are_full_fp32_meanwhile_and_as_before_after(matmul) -> None:
    with full_precision(CUDA):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_the_switch_comes_back_after_an_error(matmul) -> None:
    with pytest.raises(RuntimeError, match="inside"), full_precision(CUDA):
        raise RuntimeError("inside")
    assert matmul.fp32_precision == "tf32"


def test_the_last_of_several_threads_puts_it_back(matmul) -> None:
    inside, first_out = Barrier(2), Barrier(2)
    seen = []

    def first() -> None:
        with full_precision(CUDA):
            inside.wait()
        first_out.wait()

    def second() -> None:
        with full_precision(CUDA):
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


def test_cpu_work_leaves_the_switch_alone(matmul) -> None:
    with full_precision(torch.device("cpu")):
        assert matmul.fp32_precision == "tf32"
