"""CART + AdaRank on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("fusion_bench")

from cart_plugin import CartError, CartSettings
from cart_plugin.fusion_bench.adarank import (
    CartAdaRank,
    CartCLIPAdaRankAlgorithm,
    CartFlanT5AdaRankAlgorithm,
    CartGPT2AdaRankAlgorithm,
    CartImageAdaRankAlgorithm,
)
from cart_plugin.fusion_bench.algorithm import CartAlgorithm, CartUncenteredAlgorithm
from cart_plugin.fusion_bench.images import HEAD_NAMES
from cart_plugin.fusion_bench.merged import LowRankTerm, Merged
from cart_plugin.fusion_bench.ranks import Ranks
from cart_plugin.merging.directions import directions_of
from tests.fusion_bench import tiny
from tests.support import random

Pool = Callable[..., Any]
CART: dict[str, Any] = {"rank": 2, "scaling_factor": 1.7}
FAST: dict[str, Any] = {"max_steps": 3, "lr": 0.01, "mask_lr": 0.3, "batch_size": 4}
POOLS = [
    pytest.param(CartCLIPAdaRankAlgorithm, tiny.clip_pool, id="clip"),
    pytest.param(CartGPT2AdaRankAlgorithm, tiny.gpt2_pool, id="gpt2"),
    pytest.param(CartFlanT5AdaRankAlgorithm, tiny.t5_pool, id="flan-t5"),
    pytest.param(CartImageAdaRankAlgorithm, tiny.image_pool, id="image"),
]


@pytest.fixture(autouse=True)
def cache_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FusionBench's cache of zero-shot heads is that of the folder it was imported in."""
    monkeypatch.setattr("fusion_bench.utils.cache_utils.DEFAULT_CACHE_DIR", tmp_path / "cache")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors without heads."""
    state = model.state_dict()
    return {n: tensor for n, tensor in state.items() if n.split(".")[0] not in HEAD_NAMES}


def same(one: nn.Module, other: nn.Module, atol: float = 1e-5) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(tensor, theirs[name], atol=atol) for name, tensor in ours.items()
    )


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize(("algorithm", "pool"), POOLS)
def test_step_0_is_cart(
    algorithm: type[CartAdaRank], pool: Pool, granularity: str, tmp_path: Path
) -> None:
    models = pool(tmp_path)
    expected = CartAlgorithm(**CART).run(models)
    merged = algorithm(granularity=granularity, max_steps=0, **CART).run(models)
    assert same(merged, expected)


@pytest.mark.parametrize("rule", [{}, {"energy": 0.3}, {"rank_ratio": 0.25}], ids=str)
def test_step_0_is_cart_by_any_rank_rule_with_weights(rule: dict[str, Any], tmp_path: Path) -> None:
    models = tiny.gpt2_pool(tmp_path)
    settings = {**rule, "scaling_factor": 1.7, "weights": [1.0, 3.0, 0.5]}
    expected = CartAlgorithm(**settings).run(models)
    assert same(CartGPT2AdaRankAlgorithm(max_steps=0, **settings).run(models), expected)


@pytest.mark.parametrize(
    ("algorithm", "pool"),
    [
        pytest.param(CartCLIPAdaRankAlgorithm, tiny.clip_pool, id="clip"),
        pytest.param(CartImageAdaRankAlgorithm, tiny.image_pool, id="image"),
    ],
)
def test_step_0_is_uncentred_cart_around_the_pretrained_model(
    algorithm: type[CartAdaRank], pool: Pool, tmp_path: Path
) -> None:
    models = pool(tmp_path)
    settings = {"rank": 2, "scaling_factor": 0.4}
    expected = CartUncenteredAlgorithm(**settings).run(models)
    merged = algorithm(center="base", max_steps=0, **settings).run(models)
    assert same(merged, expected)
    assert not same(merged, CartAlgorithm(**settings).run(models))


@pytest.mark.parametrize(("algorithm", "pool"), POOLS)
def test_step_0_is_cart_auto(algorithm: type[CartAdaRank], pool: Pool, tmp_path: Path) -> None:
    models = pool(tmp_path)
    expected = CartAlgorithm(scaling_factor="auto").run(models)
    assert same(algorithm(scaling_factor="auto", max_steps=0).run(models), expected)


def test_around_the_average_the_pretrained_model_has_no_part(tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path / "with")
    without = tiny.image_pool(tmp_path / "without", pretrained=False)
    expected = CartAlgorithm(scaling_factor="auto").run(without)
    run = CartImageAdaRankAlgorithm(scaling_factor="auto", center="average", max_steps=0)
    assert same(run.run(models), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_start_as_cart_merges_them(dtype: torch.dtype) -> None:
    models: dict[str, nn.Module] = {
        task: tiny.perturbed(nn.Linear(24, 16), seed, 1.0).to(dtype)
        for seed, task in enumerate(tiny.TASKS)
    }
    expected = CartAlgorithm(**CART).run(dict(models))
    merged = CartGPT2AdaRankAlgorithm(max_steps=0, **CART).run(dict(models))
    assert merged.weight.dtype == dtype
    assert same(merged, expected, 0.05)
    # Sums in another order round a few entries the other way; a rounded centre would half of them.
    assert (merged.weight != expected.weight).double().mean() < 0.02


def test_the_gradient_of_scores_is_that_of_the_mask() -> None:
    versions = [random(6, 4, seed=seed) for seed in range(3)]
    found = directions_of(versions, CartSettings(rank=1), candidates=1.0)
    model = nn.Linear(4, 6, bias=False)
    term = LowRankTerm(found, torch.float32, masked=True)
    module = Merged(model, {"weight": term}, [0.5, 1.0, 2.0], "task")
    gradient = random(6, 4, seed=9)
    (module.weights()["weight"] * gradient).sum().backward()

    # dL/db_ti = c_t s_ti u_ti' G v_ti, whether the direction is on or off.
    scores, coefficients = [], []
    for factors, kept, c in zip(found.factors, found.kept, [0.5, 1.0, 2.0], strict=True):
        along = [
            float(factors.S[0, i] * factors.U[0, :, i] @ gradient @ factors.Vh[0, i])
            for i in range(4)
        ]
        scores += [c * one for one in along]
        coefficients.append(sum(one for one, on in zip(along, kept[0], strict=True) if on))
    assert term.scores is not None
    assert term.scores.grad is not None
    assert module.merge_weight.grad is not None
    assert torch.allclose(term.scores.grad[0], torch.tensor(scores), atol=1e-5)
    assert torch.allclose(module.merge_weight.grad, torch.tensor(coefficients), atol=1e-5)
    assert term.counts(term.mask) == [1, 1, 1]


def test_a_score_above_a_half_adds_its_direction() -> None:
    versions = [random(2, 6, 4, seed=seed) for seed in range(3)]  # a stack of two
    found = directions_of(versions, CartSettings(rank=1), candidates=1.0)
    term = LowRankTerm(found, torch.float32, masked=True)
    before = term(torch.ones(3))
    assert term.scores is not None
    with torch.no_grad():
        term.scores[1, 4 + 2] = 0.6  # the second matrix's third direction of the second task
        term.scores[0, 0] = 0.4  # the first matrix's first of the first task
    added, gone = found.factors[1], found.factors[0]
    moved = term(torch.ones(3)) - before
    on = added.S[1, 2] * torch.outer(added.U[1, :, 2], added.Vh[1, 2])
    off = gone.S[0, 0] * torch.outer(gone.U[0, :, 0], gone.Vh[0, 0])
    assert torch.allclose(moved, torch.stack([-off, on]), atol=1e-6)
    assert term.counts(term.mask) == [1, 3, 2]
    ranks = Ranks.of(term)
    assert ranks == Ranks(2, [8, 8, 8], [2, 2, 2], [1, 3, 2], [0, 1, 0])
    assert ranks.removed == [1, 0, 0]


@pytest.mark.parametrize("settings", [CART, {"scaling_factor": "auto", "candidates": 1}], ids=str)
@pytest.mark.parametrize(("algorithm", "pool"), POOLS)
def test_adapted_masks_are_saved_and_reloaded(
    algorithm: type[CartAdaRank], pool: Pool, settings: dict[str, Any], tmp_path: Path
) -> None:
    models, file = pool(tmp_path), tmp_path / "saved" / "masks.safetensors"
    merged = algorithm(merging_weights_save_path=str(file), **FAST, **settings).run(models)
    start = algorithm(max_steps=0, **settings).run(models)
    assert not same(merged, start, 1e-3)
    assert [one.name for one in file.parent.iterdir()] == ["masks.safetensors"]
    again = algorithm(merging_weights_load_path=str(file), **settings).run(models)
    assert same(again, merged, 0)


def test_ranks_are_reported_by_layer_and_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, masks, file = tiny.image_pool(tmp_path), tmp_path / "m", tmp_path / "out" / "ranks.json"
    settings = {**FAST, **CART, "candidates": 1.0}
    run = CartImageAdaRankAlgorithm(
        merging_weights_save_path=str(masks), ranks_save_path=str(file), **settings
    )
    run.run(models)
    shown = capsys.readouterr().out
    layers, saved = json.loads(file.read_text()), load_file(masks)
    assert {f"mask.{name}" for name in layers} == set(saved) - {"coefficients", "sizes"}
    for name, layer in layers.items():
        chosen = saved[f"mask.{name}"].view(1, 3, -1).sum(-1)[0].tolist()
        assert layer["chosen"] == dict(zip(tiny.TASKS, chosen, strict=True))
        assert layer["start"] == dict.fromkeys(tiny.TASKS, 2)
        assert all(
            layer["start"][task] + layer["added"][task] - layer["removed"][task]
            == layer["chosen"][task]
            for task in tiny.TASKS
        )
        assert layer["candidates"] == dict.fromkeys(tiny.TASKS, saved[f"mask.{name}"].shape[1] // 3)
    for task in tiny.TASKS:
        mean = sum(layer["chosen"][task] for layer in layers.values()) / len(layers)
        added = sum(layer["added"][task] for layer in layers.values()) / len(layers)
        assert added > 0
        assert f"  {task:7}  2.0 -> {mean:.1f} ({added:.1f} added, " in shown
    assert f"mean of {len(layers)} matrices" in shown


def test_adaptation_lowers_entropy(tmp_path: Path) -> None:
    from tests.fusion_bench.test_adamerging import entropies

    models = tiny.image_pool(tmp_path)
    before = sum(entropies(CartImageAdaRankAlgorithm(max_steps=0, **CART).run(models)))
    # The coefficients all but stand still: it is the masks' work.
    run = CartImageAdaRankAlgorithm(max_steps=8, lr=1e-9, mask_lr=0.1, batch_size=12, **CART)
    assert sum(entropies(run.run(models))) < before - 0.01


def test_no_task_has_dense_matrices(tmp_path: Path) -> None:
    models = tiny.gpt2_pool(tmp_path)
    module = CartGPT2AdaRankAlgorithm(candidates=0.25, **CART).construct(models)
    tasks = len(tiny.TASKS)
    for name, term in module.terms.items():
        shape = term.centre.shape
        if len(shape) == 1:
            continue
        m, n = shape
        factors = tasks * (min(m, n) // 4) * (m + n + 4)
        numbers = sum(buffer.numel() for buffer in [*term.buffers(), *term.parameters()])
        assert numbers <= m * n + factors, name
    assert "wte.weight" not in module.terms  # not decomposed: at the average, without coefficients


def test_masks_of_others_are_refused(tmp_path: Path) -> None:
    models, file = tiny.gpt2_pool(tmp_path / "one"), tmp_path / "masks.safetensors"
    CartGPT2AdaRankAlgorithm(max_steps=0, merging_weights_save_path=str(file), **CART).run(models)

    def refused(message: str, pool: Any = models, **settings: Any) -> None:
        run = CartGPT2AdaRankAlgorithm(
            **{**CART, "merging_weights_load_path": str(file), **settings}
        )
        with pytest.raises(CartError, match=message):
            run.run(pool)

    refused("other models.*candidates", candidates=1.0)
    refused("other models", scaling_factor="auto")
    refused("need coefficients of shape", granularity="task")
    other = tiny.gpt2_pool(tmp_path / "other")
    names = [str(tmp_path / "one" / task) for task in tiny.TASKS]
    for name, place in zip(tiny.TASKS, reversed(names), strict=True):
        other._models[name].pretrained_model_name_or_path = place
    refused("other models", other)
    file.write_bytes(b"no tensors")
    refused("does not load")
    save_file({"x": torch.zeros(1)}, file)
    refused("holds nothing that an adaptation has saved")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_lr": 0}, "mask_lr must be a positive number, got 0"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"candidates": 0.0}, "candidates must be a positive number"),
        ({"candidates": 1.5}, "at most 1, got 1.5"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
    ],
)
def test_wrong_parameters_are_told_first(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartGPT2AdaRankAlgorithm(**settings)


def test_what_does_not_go_together_is_told(tmp_path: Path) -> None:
    models = tiny.gpt2_pool(tmp_path)
    with pytest.raises(CartError, match="give the pool a _pretrained_"):
        CartGPT2AdaRankAlgorithm(center="base").run(models)
    with pytest.raises(CartError, match=r"keeps 8 singular directions, but candidates=0.25 are 4"):
        CartGPT2AdaRankAlgorithm(rank=8, candidates=0.25).run(models)
    with pytest.raises(CartError, match="there are no ranks to adapt"):
        CartGPT2AdaRankAlgorithm(exclude_keys=["*"]).run(models)
