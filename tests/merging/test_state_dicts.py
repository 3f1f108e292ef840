"""State dicts are merged tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.state_dicts import merge_state_dicts
from tests.merging.helpers import state_dict, versions
from tests.support import cart_formula, random, relative_error


def test_state_dict_is_merged_tensor_by_tensor() -> None:
    models = [state_dict(seed) for seed in range(3)]
    merged = merge_state_dicts(models, CartSettings(rank=2))
    assert list(merged) == list(models[0])
    expected = cart_formula([model["fc.weight"] for model in models], 2)
    assert relative_error(merged["fc.weight"], expected) <= 1e-5
    for name in ("embed_tokens.weight", "fc.bias"):
        assert torch.allclose(merged[name], torch.stack([m[name] for m in models]).mean(0))
    assert torch.equal(merged["position_ids"], models[0]["position_ids"])
    assert merged["position_ids"] is not models[0]["position_ids"]


def test_lazy_state_dicts_are_asked_once_for_each_tensor() -> None:
    class Lazy(Mapping[str, Tensor]):
        def __init__(self, loaded: dict[str, Tensor]) -> None:
            self.loaded, self.asked = loaded, list[str]()

        def __getitem__(self, name: str) -> Tensor:
            self.asked.append(name)
            return self.loaded[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.loaded)

        def __len__(self) -> int:
            return len(self.loaded)

    models = [Lazy(state_dict(seed)) for seed in range(3)]
    merge_state_dicts(models)
    for model in models:
        assert model.asked == list(model.loaded)


def test_base_of_the_uncentred_ablation_comes_as_a_state_dict() -> None:
    models, base = [state_dict(seed) for seed in range(3)], state_dict(9)
    given = CartSettings(rank=2, center="base")
    merged = merge_state_dicts(models, given, base=base)
    tensors = [model["fc.weight"] for model in models]
    assert (
        relative_error(merged["fc.weight"], cart_formula(tensors, 2, base=base["fc.weight"])) < 1e-5
    )
    average = torch.stack([model["fc.bias"] for model in models]).mean(0)
    assert torch.allclose(merged["fc.bias"], average)


def test_a_base_that_is_not_used_need_not_fit() -> None:
    models = [state_dict(seed) for seed in range(3)]
    unused = {"other": torch.zeros(1)}
    merged = merge_state_dicts(models, base=unused)
    assert torch.equal(merged["fc.weight"], merge_state_dicts(models)["fc.weight"])
    broken = torch.full((4, 4), math.nan)
    assert torch.isfinite(merge_tensors(versions(4, 4), base=broken)).all()


def test_the_bases_shape_does_not_matter_where_it_is_not_used() -> None:
    states = [{"model.embed_tokens.weight": random(10, 4, seed=seed)} for seed in range(3)]
    base = {"model.embed_tokens.weight": random(11, 4)}
    merged = merge_state_dicts(states, CartSettings(center="base"), base=base)
    assert merged["model.embed_tokens.weight"].shape == (10, 4)


@pytest.mark.cpu_only  # what stands for the solver there leaves the device
def test_each_tensor_has_its_own_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recorded(x: Tensor, rule: RankRule, *, svd: str, seed: int, rounding: Any) -> Any:
        seeds.append(seed)
        return truncated_svd(x, rule, svd=svd, seed=seed, rounding=rounding)

    monkeypatch.setattr("cart_plugin.merging.differences.truncated_svd", recorded)
    tensors = versions(8, 8, count=3)
    for name, seed in (("a.weight", 0), ("b.weight", 0), ("a.weight", 5), ("a.weight", 0)):
        merge_tensors(tensors, CartSettings(seed=seed), name=name)
    assert [len(set(seeds[i : i + 3])) for i in (0, 3, 6, 9)] == [1, 1, 1, 1]
    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[9]


def test_counters_end_at_the_largest() -> None:
    models = [{"num_batches_tracked": torch.tensor(count)} for count in (3, 9, 5)]
    assert torch.equal(merge_state_dicts(models)["num_batches_tracked"], torch.tensor(9))


def test_counters_keep_the_longest_training() -> None:
    states = [{"norm.num_batches_tracked": torch.tensor(count)} for count in (5, 7, 6)]
    assert merge_state_dicts(states)["norm.num_batches_tracked"] == 7
