"""Curves and measures of the benchmark against what they must be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.auto.members import sets_of
from benchmarks.theory import subsets
from benchmarks.theory.geometry import SHARES, curves_of, in_common, of_matrices
from benchmarks.theory.merges import measure
from cart_plugin.inspect.weights import Weight, of_tensors
from tests.support import power_law, with_spectrum


def differences(count: int) -> list[Tensor]:
    return [with_spectrum(power_law(20, 0.7), 20, 30, seed=10 * t)[None] for t in range(count)]


def apart(count: int, rank: int = 5) -> list[Tensor]:
    """Differences of neither rows nor columns in common, of equal norms."""
    left = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))[0]
    right = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(1)))[0]
    own = [slice(rank * t, rank * (t + 1)) for t in range(count)]
    return [(left[:, at] @ right[:, at].T)[None] for at in own]


def test_curves_end_where_nothing_is_left_out_and_both_scales_meet() -> None:
    found = curves_of(of_matrices(differences(3)))
    assert found["R"] == sorted(found["R"], reverse=True)
    assert found["R"][-1] == pytest.approx(0, abs=1e-5)
    assert found["whole"] == sorted(found["whole"])
    assert found["whole"][-1] == pytest.approx(found["I"][-1], abs=1e-5)
    assert 0 < found["I"][0] <= 1


def test_factors_of_few_directions_have_the_ranks_of_the_full_matrix() -> None:
    parts, energies = of_matrices(apart(3))
    few = [type(part)(part.U[..., :5], part.S[..., :5], part.Vh[..., :5, :]) for part in parts]
    exact = curves_of((parts, energies))
    assert curves_of((few, energies), full=40)["R"] == pytest.approx(exact["R"], abs=1e-4)


def test_equal_models_of_one_direction_have_the_whole_interference() -> None:
    one = with_spectrum(torch.ones(1), 1, 30)
    found = curves_of(of_matrices([(torch.ones(20, 1) @ one)[None]] * 2))
    assert found["I"] == pytest.approx([1] * len(SHARES), abs=1e-4)


def test_equal_models_of_many_directions_have_less_the_more_they_are() -> None:
    (one,) = apart(1, rank=40)
    found = curves_of(of_matrices([one] * 3))
    ranks = [max(1, int(share * 40)) for share in SHARES]
    assert found["I"] == pytest.approx([rank**-0.5 for rank in ranks], abs=1e-4)


def test_interference_of_all_directions_needs_no_decomposition() -> None:
    deltas = differences(4)
    mean = sum(deltas) / len(deltas)
    found = in_common(deltas)
    for name, around in (("base", deltas), ("average", [one - mean for one in deltas])):
        assert found[name] == pytest.approx(curves_of(of_matrices(around))["I"][-1], abs=2e-5)


@pytest.mark.parametrize("count", [3, 4, 8])
def test_centring_mixes_what_has_nothing_in_common(count: int) -> None:
    found = in_common(apart(count))
    assert found["cosine"] == pytest.approx(0, abs=1e-5)
    assert found["base"] == pytest.approx(0, abs=1e-5)
    # 1 - 1/T of its own energy, and the others' in equal shares, of five equal directions.
    own, other = (count - 1) / count, 1 / (count * (count - 1))
    inner = 2 * own * other + (count - 2) * other**2
    assert found["average"] == pytest.approx((inner / 5) ** 0.5, abs=1e-4)
    assert found["mixed"] == pytest.approx(found["average"], abs=1e-4)


def test_centring_takes_off_what_models_have_in_common() -> None:
    common = torch.full((1, 40, 50), 10 / 2000**0.5)  # of norm 10 and rank 1
    found = in_common([one + common for one in apart(4)])
    assert found["average"] == pytest.approx(in_common(apart(4))["average"], abs=1e-4)
    assert found["average"] < 0.5 * found["base"]


def test_a_stack_is_of_matrices_that_have_nothing_to_do_with_each_other() -> None:
    deltas = apart(3)
    twice = [torch.cat([one, 0 * one]) for one in deltas]
    assert in_common(twice) == pytest.approx(in_common(deltas), abs=1e-5)


def weights() -> Iterator[Weight]:
    generator = torch.Generator().manual_seed(0)
    for name in ("layers.0.a.weight", "layers.1.a.weight"):
        base = torch.randn(20, 30, generator=generator)
        tuned = [base + one[0] for one in differences(3)]
        found = of_tensors(name, tuned, ["x", "y", "z"], base)
        assert isinstance(found, Weight)
        yield found


def test_a_merge_that_is_one_model_keeps_all_of_it_and_nothing_is_lost() -> None:
    def merges(weight: Weight) -> Iterator[tuple[str, Tensor]]:
        yield "first", weight.around.parts[0].dense()
        yield "nothing", 0 * weight.around.parts[0].dense()

    found = measure(weights(), merges)
    assert "layers" not in found
    first, nothing = found["methods"]["first"], found["methods"]["nothing"]
    assert (first["kept"][0], first["lost"][0]) == pytest.approx((1, 0), abs=1e-4)
    assert max(first["kept"][1:]) < 0.9
    assert nothing["kept"] == [0, 0, 0]
    assert nothing["lost"] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("suite", subsets.SEEDS)
def test_subsets_are_drawn_alike_each_time_and_none_was_studied(suite: str) -> None:
    drawn = subsets.drawn(suite)
    assert drawn == subsets.drawn(suite)
    studied = {frozenset(tasks) for sets in sets_of(suite).values() for tasks in sets}
    for size, sets in drawn.items():
        tasks = [frozenset(task for _, task in members) for members in sets]
        assert len(set(tasks)) == len(tasks)
        assert {len(one) for one in tasks} == {int(size)}
        assert not studied & set(tasks)
