"""Work side by side on torch's threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.errors import CartError
from cart_plugin.linalg.threads import side_by_side
from cart_plugin.merging import cart
from tests.support import random


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "items", "threads", "expected"),
    [
        (8, 8, None, (4, 1)),
        (2, 8, None, (2, 2)),
        (8, 3, None, (3, 1)),
        (8, 1, None, (1, 4)),
        (0, 8, None, (1, 4)),
        (8, 0, None, (1, 4)),
        (2, 8, 1, (2, 1)),
        (8, 1, 1, (1, 1)),
    ],
)
def test_threads_are_dealt_out_among_items_and_given_back(
    most: int, items: int, threads: int | None, expected: tuple[int, int]
) -> None:
    workers, share = expected
    together = threading.Barrier(max(1, workers))  # so many are in the works at a time
    first = list(range(items))[:workers]

    def work(item: int) -> tuple[int, int, bool]:
        if item in first:
            together.wait(timeout=20)
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():  # a state of the thread: the others have none of it
        found = list(side_by_side(work, range(items), most, threads))
    assert found == [(item, share, False) for item in range(items)]
    assert torch.get_num_threads() == 4


def test_no_more_is_begun_than_is_in_the_works_before_results_are_taken() -> None:
    begun: list[int] = []
    results = side_by_side(begun.append, range(9), most=2)
    next(results)
    assert len(begun) <= 2
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 9
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("most", [1, 2])
def test_an_error_in_one_is_the_callers_and_threads_are_given_back(most: int) -> None:
    def work(item: int) -> int:
        if item == 1:
            raise CartError("the second")
        return item

    results = side_by_side(work, range(9), most)
    assert next(results) == 0
    with pytest.raises(CartError, match="the second"):
        next(results)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    "settings",
    [CartSettings(), CartSettings(lambda_="auto"), CartSettings(center="base")],
    ids=["cart", "auto", "base"],
)
@pytest.mark.parametrize("shape", [(96, 64), (3, 40, 32)], ids=str)
def test_differences_side_by_side_give_what_one_after_the_other_does(
    shape: tuple[int, ...], settings: CartSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tensors = (random(*shape, seed=seed) for seed in range(5))

    def merged() -> torch.Tensor:
        return merge_tensors(tensors, settings, base=base, weights=[1, 2, 0, 3])

    found = merged()
    assert torch.equal(found, merged())
    monkeypatch.setattr(cart, "SIDE_BY_SIDE", 1)
    assert torch.allclose(found, merged(), atol=1e-5)


def test_a_value_that_is_not_finite_is_named_from_any_thread() -> None:
    tensors = [random(16, 16, seed=seed) for seed in range(3)]
    tensors[1][3, 3] = torch.nan
    with pytest.raises(CartError, match="second"):
        merge_tensors(
            tensors,
            CartSettings(center="base"),
            base=random(16, 16, seed=9),
            models=["first", "second", "third"],
        )
    assert torch.get_num_threads() == 4
