"""Differences of large weights are sketched: that hardly moves what is said of them."""

from __future__ import annotations

import pytest
from torch import Tensor

from cart_plugin.inspect.measures import Record, record
from cart_plugin.inspect.weights import Weight, of_tensors
from cart_plugin.linalg import svd
from tests.support import power_law, random, with_spectrum

SIDES = (512, 576)
MODELS = ["a", "b", "c"]


def weight() -> Weight:
    """Of three models with inputs in common; the singular values fall slowly."""
    m, n = SIDES
    common = with_spectrum(power_law(m, 0.5), m, n, seed=50)
    base = random(m, n, seed=9)
    tensors: list[Tensor] = [
        base + 0.05 * (with_spectrum(power_law(m, 0.5), m, n, seed=seed) + 0.4 * common)
        for seed in range(3)
    ]
    found = of_tensors("layers.0.mlp.up_proj.weight", tensors, MODELS, base)
    assert isinstance(found, Weight)
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Record, Record]:
    """What is said by the sketch, and by the exact solver in its place."""
    sketched = record(weight(), MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(svd.SOLVERS, "sketch", svd.SOLVERS["exact"])
        exact = record(weight(), MODELS)
    assert sketched != exact
    return sketched, exact


@pytest.mark.parametrize("kind", ["centred", "from_base"])
def test_curves_are_those_of_exact_directions(pair: tuple[Record, Record], kind: str) -> None:
    found, exact = (one[kind] for one in pair)
    assert found["R"] == pytest.approx(exact["R"], rel=1.5e-2)  # the last one; the others 5e-3
    assert found["R"][:-1] == pytest.approx(exact["R"][:-1], rel=5e-3)
    assert found["I"] == pytest.approx(exact["I"], rel=2e-2)


def test_overlaps_and_what_merges_keep_are_those_of_exact_directions(
    pair: tuple[Record, Record],
) -> None:
    found, exact = pair
    for key in ("row_overlap", "column_overlap"):
        for one, other in zip(found[key], exact[key], strict=True):
            assert one == pytest.approx(other, abs=1e-2), key
    assert found["effective_rank"] == pytest.approx(exact["effective_rank"], rel=1e-2)
    assert found["methods"].keys() == exact["methods"].keys()
    for method, entry in exact["methods"].items():
        for key in ("kept", "lost"):
            assert found["methods"][method][key] == pytest.approx(entry[key], abs=1e-2), method
