"""The switches that let products round to TF32 or bf16: off while work is under way, then back."""

from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.linalg.precision import full_precision
from cart_plugin.merging.directions import directions_of
from cart_plugin.merging.indexing import index_tensors, spectra_of
from cart_plugin.merging.spans import Difference, Span, merge_in_span, of_rank
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


class Products(TorchDispatchMode):
    """Notes the precision of every product of fp32 matrices."""

    def __init__(self, matmul: Any) -> None:
        super().__init__()
        self.matmul, self.seen = matmul, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        is_product = name in ("mm", "bmm", "addmm", "baddbmm", "mv", "cholesky_solve")
        if is_product and torch.float32 in {one.dtype for one in args if isinstance(one, Tensor)}:
            self.seen.add(self.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


AUTO = CartSettings(lambda_="auto")
BASE = random(64, 80, seed=50)
WHOLE = [BASE + random(64, 80, seed=seed) / 10 for seed in range(6)]
LORA = [BASE + random(64, 3, seed=seed) @ random(3, 80, seed=9 + seed) / 10 for seed in range(6)]
LARGE = [
    Difference(random(1, 300, 150, seed=seed), random(1, 150, 320, seed=9 + seed))
    for seed in range(3)
]
PRODUCTS: dict[str, Callable[[], object]] = {
    "cart": lambda: merge_tensors(WHOLE, CartSettings(rank=8)),
    "energy": lambda: merge_tensors(WHOLE, CartSettings(energy=0.9)),
    "auto": lambda: merge_tensors(WHOLE[:3], AUTO),
    "auto, a base": lambda: merge_tensors(WHOLE[:4], AUTO, base=BASE),
    "auto, adapters": lambda: merge_tensors(LORA[:3], AUTO, base=BASE),
    "auto, many adapters": lambda: merge_tensors(LORA, AUTO),
    "directions": lambda: directions_of(WHOLE[:3], AUTO, base=BASE),
    "directions, adapters": lambda: directions_of(LORA, AUTO, base=BASE),
    "candidates": lambda: directions_of(WHOLE, candidates=0.5),
    "indexing": lambda: index_tensors(WHOLE).restored(0),
    "spectra": lambda: spectra_of(WHOLE),
    "spans": lambda: of_rank(merge_in_span(Span(LARGE), [1 / 3] * 3, AUTO), 20),
}


@pytest.mark.cpu_only  # the mode does not see what another device does
@pytest.mark.parametrize("what", PRODUCTS)
def test_all_products_are_in_full_fp32(what: str, matmul) -> None:
    with Products(matmul) as mode:
        PRODUCTS[what]()
    assert mode.seen == {"ieee"}


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


@pytest.mark.cpu_only
@pytest.mark.parametrize("what", PRODUCTS)
def test_the_tensors_say_where_they_are_worked_on_and_no_default_does(what: str) -> None:
    torch.set_default_device("meta")
    try:
        PRODUCTS[what]()
    finally:
        torch.set_default_device(None)
