"""Work side by side on torch's threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info

from cart_plugin import CartSettings, RankRule, merge_tensors, truncated_svd
from cart_plugin.errors import CartError
from cart_plugin.linalg import gram, svd
from cart_plugin.linalg.threads import side_by_side, worth
from cart_plugin.merging import differences
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
        (8, 8, 9, (4, 1)),
        (2, 8, 9, (2, 2)),
        (8, 3, 9, (3, 1)),
        (8, 1, 9, (1, 4)),
        (0, 8, 9, (1, 4)),
        (8, 0, 9, (1, 4)),
        (2, 8, 1, (2, 1)),
        (8, 1, 1, (1, 1)),
        (8, 1, 3, (1, 3)),
    ],
)
def test_threads_are_dealt_out_among_items_and_given_back(
    most: int, items: int, threads: int, expected: tuple[int, int]
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
    results = side_by_side(begun.append, range(9), most=2, threads=4)
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

    results = side_by_side(work, range(9), most, threads=4)
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
    monkeypatch.setattr(differences, "SIDE_BY_SIDE", 1)
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


def blas_threads() -> set[int]:
    """How many threads scipy's and numpy's BLAS have."""
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


@pytest.mark.parametrize(("most", "threads", "share"), [(8, 1, 1), (2, 9, 2), (1, 3, 3)])
def test_scipy_has_a_workers_threads_and_gets_its_own_back(
    most: int, threads: int, share: int
) -> None:
    before = blas_threads()
    found = list(side_by_side(lambda _: blas_threads(), range(6), most, threads))
    assert found == [{share}] * 6
    assert blas_threads() == before


def test_side_by_side_within_side_by_side_leaves_scipys_threads_alone() -> None:
    def inner(_: int) -> list[set[int]]:
        return list(side_by_side(lambda _: blas_threads(), range(2), most=2, threads=1))

    assert list(side_by_side(inner, range(2), most=2, threads=2)) == [[{2}, {2}]] * 2


@pytest.mark.parametrize(
    ("m", "n", "expected"), [(8, 8, 1), (768, 768, 1), (1024, 1024, 1), (2048, 2048, 4)]
)
def test_a_matrix_is_worth_a_thread_for_each_million_entries(m: int, n: int, expected: int) -> None:
    assert worth(m, n) == expected


@pytest.mark.cpu_only
@pytest.mark.parametrize("solver", ["exact", "fast", "subspace", "auto"])
@pytest.mark.parametrize("threads", [1, 3, 4])
def test_small_matrices_give_the_same_bytes_by_any_number_of_threads(
    solver: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "PARTIAL_SIDE", 100)  # so that scipy takes part
    tensors = [random(520, 600, seed=seed) for seed in range(3)]
    expected = merge_tensors(tensors, CartSettings(svd=solver))
    torch.set_num_threads(threads)
    assert torch.equal(merge_tensors(tensors, CartSettings(svd=solver)), expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("solver", "inner"),
    [("exact", "leading_left"), ("fast", "leading_subspace"), ("subspace", "near_subspace")],
)
def test_matrices_of_a_stack_are_solved_side_by_side(
    solver: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = random(4, 520, 600)
    expected = [truncated_svd(one, RankRule(rank=8), svd=solver) for one in stack]
    together = threading.Barrier(4)  # goes on when four have come
    solve, seen = getattr(svd, inner), []

    def noted(*arguments: object, **named: object) -> object:
        seen.append(torch.get_num_threads())
        together.wait(timeout=20)
        return solve(*arguments, **named)

    monkeypatch.setattr(svd, inner, noted)
    found = truncated_svd(stack, RankRule(rank=8), svd=solver)
    assert seen == [1] * 4
    for index, one in enumerate(expected):
        assert torch.allclose(found.dense()[index], one.dense(), atol=1e-4)
