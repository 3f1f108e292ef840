"""What the core refuses, and what it makes of unusual but valid input."""

from typing import Any

import pytest
import torch

from cart_plugin import (
    CartError,
    CartSettings,
    CartWarning,
    RankRule,
    is_decomposed,
    merge_state_dicts,
    merge_tensors,
    truncated_svd,
)
from tests.support import power_law, random, relative_error, with_spectrum


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2.5}, "rank must be 0 or a positive whole number, got 2.5"),
        ({"rank": True}, "rank must be a number, got True"),
        ({"rank": "3"}, "rank must be a number, got '3'"),
        ({"rank_ratio": "0.1"}, "rank_ratio must be a number, got '0.1'"),
        ({"lambda_": "2"}, "lambda must be a finite number, got '2'"),
        ({"lambda_": True}, "lambda must be a finite number, got True"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
    ids=repr,
)
def test_values_of_the_wrong_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartSettings(**values)


def test_a_whole_float_is_a_rank() -> None:
    assert RankRule(rank=2.0).fixed_rank(5, 6) == 2  # type: ignore[arg-type]


def test_energy_zero_averages() -> None:
    tensors = [random(6, 8, seed=seed) for seed in range(3)]
    merged = merge_tensors(tensors, CartSettings(energy=0.0, lambda_=9.0))
    assert torch.allclose(merged, torch.stack(tensors).mean(0), atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    tensors = [with_spectrum(power_law(160, 1), 160, 200, seed=i) for i in range(3)]
    fast = CartSettings(svd="fast", seed=seed)
    assert relative_error(merge_tensors(tensors, fast), merge_tensors(tensors).double()) < 1e-3


def test_three_models_of_which_one_weighs_nothing_are_averaged_with_a_warning() -> None:
    tensors = [random(6, 8, seed=seed) for seed in range(3)]
    with pytest.warns(CartWarning, match="plain averaging"):
        merged = merge_tensors(tensors, CartSettings(rank=2, lambda_=5.0), weights=[1, 1, 0])
    assert torch.allclose(merged, (tensors[0] + tensors[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused(dtype: torch.dtype) -> None:
    tensors = [random(6, 8, seed=seed).to(dtype) for seed in range(3)]
    with pytest.raises(CartError, match="quantised or integer weights cannot be averaged"):
        merge_tensors(tensors)


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(CartError, match="meta device"):
        merge_tensors([torch.zeros(4, 5, device="meta")] * 3)


def test_counters_keep_the_longest_training() -> None:
    states = [{"norm.num_batches_tracked": torch.tensor(count)} for count in (5, 7, 6)]
    assert merge_state_dicts(states)["norm.num_batches_tracked"] == 7


def test_the_bases_shape_does_not_matter_where_it_is_not_used() -> None:
    states = [{"model.embed_tokens.weight": random(10, 4, seed=seed)} for seed in range(3)]
    base = {"model.embed_tokens.weight": random(11, 4)}
    merged = merge_state_dicts(states, CartSettings(center="base"), base=base)
    assert merged["model.embed_tokens.weight"].shape == (10, 4)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_per_layer.weight",
        "deberta.encoder.rel_embeddings.weight",
        "query_tokens",
        "backbone.layers.0.mixer.A_log",
        "backbone.embeddings.weight",
        "cls.predictions.decoder.weight",
    ],
)
def test_tables_by_other_names_are_averaged(name: str) -> None:
    assert not is_decomposed(name, (64, 32))


def test_a_zero_matrix_does_not_spoil_the_stack_it_is_in() -> None:
    from cart_plugin.krylov import leading_subspace

    good = with_spectrum(power_law(320, 0.8), 320, 400)
    found = leading_subspace(
        torch.stack([good, torch.zeros_like(good)]), 25, tolerance=5e-4, seed=0
    )
    assert found is not None
    exact = truncated_svd(good, RankRule(rank=25), svd="exact").dense()
    assert relative_error(found.left[0] @ found.right[0], exact.double()) < 1e-3
    assert not (found.left[1] @ found.right[1]).any()


def test_a_matrix_of_low_rank_in_a_stack_is_right() -> None:
    good = with_spectrum(power_law(320, 0.8), 320, 400)
    low = random(320, 4) @ random(4, 400, seed=1) / 100
    found = truncated_svd(torch.stack([good, low]), RankRule(rank=25), svd="fast").dense()
    exact = truncated_svd(good, RankRule(rank=25), svd="exact").dense()
    assert relative_error(found[0], exact.double()) < 1e-3
    assert relative_error(found[1], low.double()) < 1e-5
