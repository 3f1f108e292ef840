"""CART-Indexing in FusionBench: what is restored, and what it stores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool

from cart_plugin import CartError
from cart_plugin.fusion_bench.algorithm import (
    CartIndexingAlgorithm,
)
from tests.fusion_bench.test_cart import close, models, states


def test_indexing_restores_each_model_and_counts_what_it_stores() -> None:
    held = models()
    report = CartIndexingAlgorithm(rank=2, scaling_factor=0.5).run(BaseModelPool(held))
    state = states(held)
    mean = torch.stack([s["2.weight"] for s in state.values()]).mean(0)
    for name, own in state.items():
        restored = report[name].state_dict()
        assert torch.allclose(restored["1.weight"], own["1.weight"], atol=1e-6)  # exact, no lambda
        u, s, vh = torch.linalg.svd(own["2.weight"] - mean)
        expected = mean + 0.5 * (u[:, :2] * s[:2]) @ vh[:2]
        assert torch.allclose(restored["2.weight"], expected, atol=1e-5)
    storage = report["storage"]
    matrices = {(24, 16): 2 * 40, (24, 24): 2 * 48, (5, 24): 2 * 29}
    kept = sum(m * n for m, n in matrices) + 4 * sum(matrices.values())
    vectors = 24 + 24 + 24 + 24 + 5  # biases and the norm
    assert storage["stored_parameters"] == kept + 5 * vectors
    assert storage["share"] == pytest.approx(
        storage["stored_parameters"] / storage["parameters_of_all_models"]
    )


def test_indexing_at_full_rank_is_every_model_as_it_was() -> None:
    held = models()
    report = CartIndexingAlgorithm(rank_ratio=1.0).run(BaseModelPool(held))
    assert all(close(report[name], state) for name, state in states(held).items())


def apart(report: dict[str, object], held: dict[str, nn.Module]) -> float:
    """Squared error of all restored models."""
    return sum(
        float((report[name].state_dict()[key] - tensor).double().square().sum())
        for name, state in states(held).items()
        for key, tensor in state.items()
    )


@pytest.mark.parametrize("rule", [{"rank_ratio": 0.13}, {"rank_ratio": 0.25}, {"rank": 4}])
def test_a_target_size_loses_no_more_than_one_rule_of_that_size(
    rule: dict[str, float],
) -> None:
    held = models()
    one = CartIndexingAlgorithm(svd="exact", **rule).run(BaseModelPool(held))
    share = one["storage"]["share"]
    found = CartIndexingAlgorithm(svd="exact", target_size=share).run(BaseModelPool(held))
    # Up to one direction of the largest matrix.
    slack = (24 + 24) / found["storage"]["parameters_of_all_models"]
    assert share - slack < found["storage"]["share"] <= share
    assert apart(found, held) <= apart(one, held)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_target_size_is_met(share: float) -> None:
    held = models()
    storage = CartIndexingAlgorithm(target_size=share).run(BaseModelPool(held))["storage"]
    slack = (24 + 24) / storage["parameters_of_all_models"]
    assert share - slack < storage["share"] <= share


def test_a_target_size_spends_more_where_models_differ_more() -> None:
    held = models()
    with torch.no_grad():
        held["task1"][2].weight *= 10
    report = CartIndexingAlgorithm(target_size=0.5, svd="exact").run(BaseModelPool(held))
    mean = torch.stack([state["2.weight"] for state in states(held).values()]).mean(0)
    ranks = {
        name: int(torch.linalg.matrix_rank(report[name].state_dict()["2.weight"] - mean, atol=1e-4))
        for name in states(held)
    }
    assert ranks["task1"] == max(ranks.values()) > min(ranks.values())


def test_a_target_size_leaves_buffers_and_excluded_parameters_whole() -> None:
    held = {name: nn.Sequential(*model, nn.BatchNorm1d(5)) for name, model in models().items()}
    method = CartIndexingAlgorithm(target_size=0.8, exclude_keys=["0.weight"])
    report = method.run(BaseModelPool(held))
    assert 0.78 < report["storage"]["share"] <= 0.8
    for name, state in states(held).items():
        assert torch.allclose(report[name].state_dict()["0.weight"], state["0.weight"], atol=1e-6)


def test_factors_as_large_as_the_matrix_are_the_whole_matrix() -> None:
    held = models()
    with torch.no_grad():
        held["task1"][2].weight *= 100
    report = CartIndexingAlgorithm(target_size=0.7, svd="exact").run(BaseModelPool(held))
    own = held["task1"][2].weight
    assert torch.allclose(report["task1"].state_dict()["2.weight"], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"target_size": 0.2, "rank_ratio": 0.1},
            "rank_ratio=0.1 and target_size=0.2 are two rules",
        ),
        ({"target_size": 0.2, "rank": 3}, "rank=3 and target_size=0.2 are two rules"),
        ({"target_size": 0.2, "energy": 0.9}, "energy=0.9 and target_size=0.2 are two rules"),
        ({"target_size": 20}, "target_size must lie between 0 and 1"),
    ],
)
def test_a_target_size_is_a_rule_of_its_own(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartIndexingAlgorithm(**parameters)


def test_a_target_size_below_the_centre_is_refused() -> None:
    with pytest.raises(
        CartError, match=r"the centre and what is not decomposed take [\d,]+ numbers"
    ):
        CartIndexingAlgorithm(target_size=0.2).run(BaseModelPool(models()))


def test_a_switch_shows_each_task_its_model() -> None:
    from fusion_bench.models.wrappers.switch import set_active_option

    held = models()
    switch = CartIndexingAlgorithm(rank_ratio=1.0, switch=True).run(BaseModelPool(held))["indexed"]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for name in states(held):
        set_active_option(switch, name)
        assert torch.allclose(switch(x), held[name](x), atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a-b", "A_b"), "takes the tasks 'a-b' and 'A_b' for one"),
        (("a/b", "a_b"), "takes the tasks 'a/b' and 'a_b' for one"),
        (("v1.5", "v2"), r"a task cannot be called 'v1\.5'"),
        (("type", "other"), "a task cannot be called 'type'"),
    ],
)
def test_a_switch_takes_no_names_that_it_cannot_tell_apart(
    names: tuple[str, str], message: str
) -> None:
    pool = BaseModelPool(dict.fromkeys(names, None))
    with pytest.raises(CartError, match=message):  # before the models load
        CartIndexingAlgorithm(switch=True).run(pool)
    held = dict(zip(names, (models(2)["task0"], models(2)["task1"]), strict=True))
    assert set(names) < set(CartIndexingAlgorithm(rank=2).run(BaseModelPool(held)))
