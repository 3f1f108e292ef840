"""What all merges that adapt share: the step, runs that go on, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.mixins import CLIPClassificationMixin
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from cart_plugin import CartError
from cart_plugin.fusion_bench.adamerging import (
    CartCLIPAdaMergingAlgorithm,
    CartFlanT5AdaMergingAlgorithm,
    CartGPT2AdaMergingAlgorithm,
)
from cart_plugin.fusion_bench.adaptation import Adaptation
from cart_plugin.fusion_bench.adarank import CartGPT2AdaRankAlgorithm, CartImageAdaRankAlgorithm
from cart_plugin.fusion_bench.image_adamerging import (
    CartImageAdaMergingAlgorithm,
    ImageClassificationAdaMergingAlgorithm,
)
from tests.fusion_bench import tiny

CART = {"rank": 2, "scaling_factor": 1.7}
RATES = {"lr": 0.01, "batch_size": 5}  # batches that do not divide the 12 inputs
METHODS = [
    pytest.param(CartGPT2AdaMergingAlgorithm, tiny.gpt2_pool, CART, id="adamerging-gpt2"),
    pytest.param(CartGPT2AdaRankAlgorithm, tiny.gpt2_pool, CART | {"mask_lr": 0.2}, id="adarank"),
    pytest.param(CartImageAdaMergingAlgorithm, tiny.image_pool, CART, id="adamerging-image"),
    pytest.param(ImageClassificationAdaMergingAlgorithm, tiny.image_pool, {}, id="plain-image"),
]


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(("algorithm", "pool", "settings"), METHODS)
def test_an_interrupted_run_goes_on_to_the_same_result(
    algorithm: Any, pool: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    models, file = pool(tmp_path), tmp_path / "kept" / "state.pt"
    expected = algorithm(max_steps=5, **RATES, **settings).run(models)

    class Killed(algorithm):  # type: ignore[misc]
        def progress(self, module: Any) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 4:
                raise KeyboardInterrupt
            return super().progress(module)

    Killed.__name__ = algorithm.__name__
    keeping = {"checkpoint_path": str(file), "checkpoint_every": 2, "max_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        Killed(**keeping, **RATES, **settings).run(models)
    assert torch.load(file, weights_only=True)["step"] == 2
    assert equal(algorithm(**keeping, **RATES, **settings).run(models), expected)
    assert torch.load(file, weights_only=True)["step"] == 5
    assert [one.name for one in file.parent.iterdir()] == ["state.pt"]
    # A finished one has nothing left to do.
    assert equal(algorithm(**keeping, **RATES, **settings).run(models), expected)


def test_a_run_goes_on_from_its_own_state_only(tmp_path: Path) -> None:
    models, file = tiny.gpt2_pool(tmp_path), tmp_path / "state.pt"
    settings: dict[str, Any] = {**CART, **RATES, "max_steps": 2, "checkpoint_path": str(file)}
    CartGPT2AdaRankAlgorithm(**settings).run(models)
    for other, message in [
        ({"lr": 0.02}, "of a run with lr=0.01, this one has 0.02"),
        ({"mask_lr": 0.5}, "mask_lr=0.01"),
        ({"candidates": 0.6}, "candidates=0.5, this one has 0.6"),
        ({"rank": 3}, "rank=2, this one has 3"),
        ({"weights": [1.0, 2.0, 3.0]}, "other models.*weights"),
        ({"max_steps": 1}, "2 steps on, max_steps is 1"),
    ]:
        with pytest.raises(CartError, match=message):
            CartGPT2AdaRankAlgorithm(**{**settings, **other}).run(models)
    with pytest.raises(CartError, match="method=CartGPT2AdaRankAlgorithm"):
        CartGPT2AdaMergingAlgorithm(**settings).run(models)
    in_bf16 = CartGPT2AdaRankAlgorithm(**settings)
    in_bf16.fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    with pytest.raises(CartError, match="precision=32-true, this one has bf16-mixed"):
        in_bf16.run(models)
    state = torch.load(file, weights_only=True)
    for change in (lambda one: one[:1], lambda one: one[:, :-1], lambda one: None):
        adapted = {name: change(one) for name, one in state["adapted"].items()}
        kept = {name: one for name, one in adapted.items() if one is not None}
        torch.save(state | {"adapted": kept}, file)
        with pytest.raises(CartError, match=r"adapts other numbers \(merge_weight\)"):
            CartGPT2AdaRankAlgorithm(**settings).run(models)
    file.write_bytes(b"nothing")
    with pytest.raises(CartError, match="does not load as the state of a run"):
        CartGPT2AdaRankAlgorithm(**settings).run(models)


def in_fp16() -> Fabric:
    """Its losses are scaled, and on CPUs, too; the scale doubles with each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))


def test_a_run_in_fp16_goes_on_with_its_scale(tmp_path: Path) -> None:
    models, file = tiny.gpt2_pool(tmp_path), tmp_path / "state.pt"
    settings: dict[str, Any] = {**CART, **RATES, "checkpoint_path": str(file)}
    for steps, scale in [(2, 32.0), (3, 64.0)]:
        run = CartGPT2AdaMergingAlgorithm(max_steps=steps, **settings)
        run.fabric = in_fp16()
        run.run(models)
        assert run.fabric.strategy.precision.scaler.get_scale() == scale
    whole = CartGPT2AdaMergingAlgorithm(**{**settings, "checkpoint_path": None, "max_steps": 3})
    whole.fabric = in_fp16()
    assert equal(run.run(models), whole.run(models))


def test_a_finished_run_reads_no_inputs(tmp_path: Path) -> None:
    models, file = tiny.gpt2_pool(tmp_path), tmp_path / "state.pt"
    settings: dict[str, Any] = {**CART, **RATES, "max_steps": 1, "checkpoint_path": str(file)}
    CartGPT2AdaMergingAlgorithm(**settings).run(models)
    again: Any = CartGPT2AdaMergingAlgorithm(**settings)
    again.batches = None
    again.run(models)


@pytest.mark.parametrize(
    ("algorithm", "pool"),
    [
        (CartCLIPAdaMergingAlgorithm, tiny.clip_pool),
        (CartGPT2AdaMergingAlgorithm, tiny.gpt2_pool),
        (CartFlanT5AdaMergingAlgorithm, tiny.t5_pool),
        (CartImageAdaMergingAlgorithm, tiny.image_pool),
    ],
)
def test_nothing_outlives_the_run(
    algorithm: Any, pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_bench.utils.cache_utils.DEFAULT_CACHE_DIR", tmp_path / "cache")
    before = set(multiprocessing.active_children())
    run = algorithm(max_steps=1, num_workers=1, batch_size=4, **CART)
    run.run(pool(tmp_path))
    gc.collect()
    assert set(multiprocessing.active_children()) <= before
    held = weakref.ref(next(iter(run._data.values())) if hasattr(run, "_data") else run._source)
    del run
    gc.collect()
    assert held() is None
    assert not CLIPClassificationMixin.zeroshot_weights


def test_a_run_goes_on_with_its_own_heads_only(tmp_path: Path) -> None:
    models, file = tiny.image_pool(tmp_path / "pool"), tmp_path / "state.pt"
    settings: dict[str, Any] = {**CART, **RATES, "max_steps": 1, "checkpoint_path": str(file)}
    CartImageAdaMergingAlgorithm(**settings).run(models)
    heads = {"mnist": str(tmp_path / "pool" / "svhn")}
    with pytest.raises(CartError, match="of a run with heads="):
        CartImageAdaMergingAlgorithm(heads=heads, **settings).run(models)


@pytest.mark.parametrize("algorithm", [CartImageAdaMergingAlgorithm, CartImageAdaRankAlgorithm])
def test_a_step_has_the_gradient_of_the_sum_of_entropies(
    algorithm: type[Adaptation], tmp_path: Path
) -> None:
    models = tiny.image_pool(tmp_path)
    run: Any = algorithm(**CART)  # type: ignore[arg-type]
    run.modelpool = models
    run.check_pool(models)
    module = run.construct(models)
    run.prepare_inputs(models)
    fixed = {task: next(run.batches(task)) for task in tiny.TASKS}
    adapted = [one for one in module.parameters() if one.requires_grad]

    total = sum(entropy_loss(run.logits(module, batch, task)) for task, batch in fixed.items())
    expected = torch.autograd.grad(total, adapted)
    entropies = run.step(module, module, {task: iter([batch]) for task, batch in fixed.items()})

    assert sum(entropies.values()) == pytest.approx(total.item(), rel=1e-5)
    for one, gradient in zip(adapted, expected, strict=True):
        assert gradient.abs().max() > 0
        assert torch.allclose(one.grad, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_predictions_without_an_entropy_are_told(tmp_path: Path) -> None:
    models = tiny.gpt2_pool(tmp_path)
    run = CartGPT2AdaMergingAlgorithm(rank=2, scaling_factor=1e38, max_steps=1)
    with pytest.raises(CartError, match=r"entropy of mnist's predictions is nan.*scaling_factor"):
        run.run(models)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    run = CartGPT2AdaMergingAlgorithm(max_steps=1)
    run.fabric = SimpleNamespace(world_size=2, _loggers=[])
    with pytest.raises(CartError, match="runs in one process, got 2"):
        run.run(tiny.gpt2_pool(tmp_path))


@pytest.mark.parametrize("steps", [0, 1])
def test_tasks_that_would_share_a_head_are_told_before_models_load(steps: int) -> None:
    pool = BaseModelPool({"Cars-1": None, "cars_1": None})
    with pytest.raises(CartError, match="takes the tasks 'Cars-1' and 'cars_1' for one"):
        CartImageAdaMergingAlgorithm(max_steps=steps).run(pool)


def test_adaptation_needs_modules(tmp_path: Path) -> None:
    from fusion_bench import LazyStateDict

    models = tiny.gpt2_pool(tmp_path)
    models.load_model = lambda name: object.__new__(LazyStateDict)
    with pytest.raises(CartError, match="mnist is a LazyStateDict: adaptation runs the models"):
        CartGPT2AdaMergingAlgorithm(max_steps=0).run(models)
