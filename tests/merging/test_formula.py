"""A merged matrix against the equation in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.settings import CartSettings
from tests.merging.helpers import EXACT, versions, with_spectra
from tests.support import (
    cart_formula,
    excess_energy,
    power_law,
    random,
    rank_deficient,
    relative_error,
    repeated,
    with_spectrum,
)


def is_close(merged: Tensor, expected: Tensor, centre: Tensor, size: float = 0.0) -> bool:
    """Whether what was added to a centre is right to 1e-5, but for the rounding of fp32.

    Args:
        merged: what is tested.
        expected: what it should be, in double precision.
        centre: what it was added to.
        size: norm of the terms of which the difference is the sum, if they cancel.
    """
    error = float((merged.double() - expected).norm())
    delta = float((expected - centre.double()).norm())
    rounding = torch.finfo(torch.float32).eps * float(expected.norm())
    return error <= 1e-5 * max(delta, size) + rounding


# Matrices of four models.
FAMILIES: dict[str, list[Tensor]] = {
    "random": versions(60, 60),
    "tall": versions(200, 40),
    "wide": versions(40, 200),
    "small": versions(2, 3),
    "decaying": with_spectra(power_law(60, 1), 60, 80),
    "steep": with_spectra(power_law(60, 2), 60, 80),
    "rank-deficient": with_spectra(rank_deficient(60, 3), 60, 80),
    "doubles": versions(60, 70, dtype=torch.float64),
}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 4.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_is_merged_as_the_equation_says(family: str, weights: list[float] | None) -> None:
    tensors = FAMILIES[family]
    full = min(tensors[0].shape)
    for k in sorted({1, max(1, full // 12), full // 3, full - 1} - {0}):
        given = CartSettings(rank=k, lambda_=1.7, svd=EXACT)
        merged = merge_tensors(tensors, given, weights=weights)
        expected = cart_formula(tensors, k, scale=1.7, weights=weights)
        centre = cart_formula(tensors, 0, weights=weights)
        # With most of each kept, the terms cancel: all of each would sum to zero.
        size = float(torch.stack([tensor - centre for tensor in tensors]).norm())
        assert is_close(merged, expected, centre, size if 8 * k > full else 0.0), k


@pytest.mark.parametrize("svd", ["auto", "fast"])
def test_the_other_solvers_stay_within_their_tolerance(svd: str) -> None:
    tensors = with_spectra(power_law(200, 0.5), 200, 200)
    merged = merge_tensors(tensors, CartSettings(svd=svd))
    expected, centre = cart_formula(tensors, 16), cart_formula(tensors, 0)
    assert relative_error(merged - centre, expected - centre) <= 2e-3


def test_small_differences_around_a_large_base_are_merged() -> None:
    base = random(60, 80, seed=99)
    tensors = [base + 1e-3 * tensor for tensor in with_spectra(power_law(60, 0.5), 60, 80)]
    expected = cart_formula(tensors, 5, scale=1.7)
    merged = merge_tensors(tensors, CartSettings(rank=5, lambda_=1.7))
    assert relative_error(merged, expected) <= 2 * torch.finfo(torch.float32).eps


def test_repeated_singular_values_are_merged_as_well_as_any() -> None:
    tensors = with_spectra(repeated(60, 5), 60, 80, count=3)
    zero = torch.zeros(60, 80)
    for k in (5, 10, 55):
        given = CartSettings(rank=k, center="base", svd=EXACT)
        merged = merge_tensors(tensors, given, base=zero)
        assert is_close(merged, cart_formula(tensors, k, base=zero), zero)
    for k in (1, 7, 33, 59):  # many matrices are the best one then
        given = CartSettings(rank=k, lambda_=1 / 3, center="base", svd=EXACT)
        merged = merge_tensors(tensors, given, base=zero, weights=[1.0, 0.0, 0.0])
        assert excess_energy(tensors[0], merged, k) <= 1e-5
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-5)) == k


@pytest.mark.parametrize("family", ["random", "tall", "rank-deficient"])
def test_uncentred_ablation_starts_at_the_base(family: str) -> None:
    tensors = FAMILIES[family]
    base = random(*tensors[0].shape, seed=99)
    weights = [1.0, 2.0, 0.5, 4.0]
    given = CartSettings(rank=3, lambda_=0.4, center="base", svd=EXACT)
    merged = merge_tensors(tensors, given, weights=weights, base=base)
    expected = cart_formula(tensors, 3, scale=0.4, weights=weights, base=base)
    assert is_close(merged, expected, base)


def test_uncentred_full_rank_is_task_arithmetic() -> None:
    tensors, base = versions(20, 30, count=3), random(20, 30, seed=99)
    full = CartSettings(rank_ratio=1.0, lambda_=0.3, center="base")
    expected = base + 0.3 * (tensors[0] + tensors[1] + tensors[2] - 3 * base)
    assert torch.allclose(merge_tensors(tensors, full, base=base), expected, atol=1e-5)


def test_experts_are_decomposed_one_by_one() -> None:
    tensors = versions(5, 30, 40)
    given = CartSettings(rank_ratio=0.1, svd=EXACT)
    merged = merge_tensors(tensors, given, name="mlp.experts.gate_up_proj")
    assert is_close(merged, cart_formula(tensors, 3), cart_formula(tensors, 0))
    for expert in range(5):
        alone = merge_tensors([tensor[expert] for tensor in tensors], given)
        assert relative_error(merged[expert], alone) <= 1e-6


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings.patch_embeddings.projection.weight", (16, 3, 4, 4)),
        ("layer1.0.conv1.weight", (16, 8, 3, 3)),
        ("mamba.mixer.conv1d.weight", (16, 4, 5)),
        ("encoder.conv3d.weight", (12, 3, 2, 2, 2)),
        (None, (16, 3, 4, 4)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_kernels_are_one_matrix(
    name: str | None, shape: tuple[int, ...], channels_last: bool
) -> None:
    tensors = versions(*shape)
    if channels_last and len(shape) == 4:
        tensors = [tensor.to(memory_format=torch.channels_last) for tensor in tensors]
    for center, base in (("average", None), ("base", tensors[0] + 1)):
        given = CartSettings(rank=3, center=center, svd=EXACT)  # type: ignore[arg-type]
        merged = merge_tensors(tensors, given, name=name, base=base)
        matrices = [tensor.reshape(shape[0], -1) for tensor in tensors]
        flat = None if base is None else base.reshape(shape[0], -1)
        expected = cart_formula(matrices, 3, base=flat).reshape(shape)
        assert merged.shape == shape
        assert relative_error(merged, expected) <= 1e-5


def test_energy_is_counted_per_model() -> None:
    tensors = with_spectra(power_law(40, 1), 40, 50)
    merged = merge_tensors(tensors, CartSettings(energy=0.8, svd=EXACT))
    centre = torch.stack(tensors).double().mean(0)
    expected = centre.clone()
    ranks = []
    for tensor in tensors:
        u, s, vh = torch.linalg.svd(tensor - centre, full_matrices=False)
        ranks.append(int((s.square().cumsum(0) / s.square().sum() >= 0.8).int().argmax()) + 1)
        expected += (u[:, : ranks[-1]] * s[: ranks[-1]]) @ vh[: ranks[-1]]
    assert max(ranks) < 40
    assert is_close(merged, expected, centre)


def test_rank_defaults_to_eight_percent_and_lambda_to_one() -> None:
    tensors = versions(100, 130)
    assert relative_error(merge_tensors(tensors), cart_formula(tensors, 8)) <= 1e-5


def test_a_model_of_weight_zero_leaves_no_trace() -> None:
    tensors = versions(20, 30, count=4)
    given = CartSettings(rank=3, svd=EXACT)
    merged = merge_tensors(tensors, given, weights=[1.0, 2.0, 0.0, 3.0])
    others = [tensors[i] for i in (0, 1, 3)]
    centre = cart_formula(others, 0, weights=[1.0, 2.0, 3.0])
    # mean(w) counts the model: it lowers the sum as a zero vector in its place would
    expected = cart_formula(others, 3, weights=[1.0, 2.0, 3.0], scale=4 / 3)
    assert relative_error(merged - centre, expected - centre) <= 1e-5


def test_negative_weights_subtract() -> None:
    tensors, weights = versions(20, 30, count=3), [2.0, 1.0, -0.5]
    merged = merge_tensors(tensors, CartSettings(rank=4, svd=EXACT), weights=weights)
    assert relative_error(merged, cart_formula(tensors, 4, weights=weights)) <= 1e-5


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    tensors = [with_spectrum(power_law(160, 1), 160, 200, seed=i) for i in range(3)]
    fast = CartSettings(svd="fast", seed=seed)
    assert relative_error(merge_tensors(tensors, fast), merge_tensors(tensors).double()) < 1e-3
