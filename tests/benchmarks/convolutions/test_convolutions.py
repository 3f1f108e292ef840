"""EfficientNet-lite0 and its merges, on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.common.record import Record
from benchmarks.convolutions import suite
from benchmarks.convolutions.backbone import (
    Convolution,
    EfficientNetLite0,
    load_weights,
    weights_of,
)
from benchmarks.convolutions.suite import METHODS, Method, Seed, merge
from cart_plugin import CartSettings, merge_state_dicts


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "_expand_conv.weight": (12, 6, 1, 1),
        "_depthwise_conv.weight": (12, 1, 3, 3),
        "_bn1.weight": (12,),
        "_bn1.running_mean": (12,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


BASE = state(9)
TUNED = {f"task{seed}": state(seed) for seed in range(4)}
AVERAGE = {name: sum(one[name] for one in TUNED.values()) / 4 for name in BASE}


def test_the_encoder_is_efficientnet_lite0() -> None:
    model = EfficientNetLite0().eval()
    # 4,652,008 with ImageNet's classifier.
    assert sum(value.numel() for value in model.parameters()) == 4_652_008 - 1_281_000
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1280)
    weights = weights_of(model)
    assert {"_conv_stem.weight", "_blocks.1._expand_conv.weight", "_bn1.running_var"} <= set(
        weights
    )
    other = EfficientNetLite0().eval()
    load_weights(other, weights)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(other).items())
    del weights["_conv_stem.weight"]
    with pytest.raises(ValueError, match=r"_conv_stem\.weight"):
        load_weights(other, weights)


def test_strided_convolutions_pad_at_the_end() -> None:
    layer = Convolution(1, 1, 3, stride=2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
    images = torch.randn(1, 1, 6, 6)
    padded = nn.functional.pad(images, (0, 1, 0, 1))
    assert torch.allclose(layer(images), nn.functional.conv2d(padded, layer.weight, stride=2))
    assert layer(torch.randn(1, 1, 7, 5)).shape == (1, 1, 4, 3)


def test_kernels_are_matrices_or_averaged() -> None:
    point = {"rank_ratio": 0.32, "lambda": 2.0}
    every = merge(METHODS["cart all"], point, TUNED, BASE)
    assert not torch.allclose(every["_depthwise_conv.weight"], AVERAGE["_depthwise_conv.weight"])
    some = merge(METHODS["cart 1 x 1"], point, TUNED, BASE)
    assert torch.allclose(some["_depthwise_conv.weight"], AVERAGE["_depthwise_conv.weight"])
    assert torch.equal(some["_expand_conv.weight"], every["_expand_conv.weight"])
    flat = {task: {"w": one["_depthwise_conv.weight"].view(12, 9)} for task, one in TUNED.items()}
    core = merge_state_dicts(flat, CartSettings(rank_ratio=0.32, lambda_=2.0))["w"]
    assert torch.allclose(every["_depthwise_conv.weight"].view(12, 9), core, atol=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_batch_norms_are_averaged_by_all_but_task_arithmetic(name: str) -> None:
    method = METHODS[name]
    merged = merge(method, method.points()[0], TUNED, BASE)
    assert {key: value.shape for key, value in merged.items()} == {
        key: value.shape for key, value in BASE.items()
    }
    if name != "task_arithmetic":
        assert torch.allclose(merged["_bn1.running_mean"], AVERAGE["_bn1.running_mean"], atol=1e-6)
    is_average = torch.allclose(merged["_expand_conv.weight"], AVERAGE["_expand_conv.weight"])
    assert is_average == (name == "average")


def test_task_arithmetic_at_its_mean_is_the_average() -> None:
    merged = merge(METHODS["task_arithmetic"], {"scale": 0.25}, TUNED, BASE)
    assert all(torch.allclose(merged[name], AVERAGE[name], atol=1e-6) for name in BASE)


def test_no_method_has_too_many_settings() -> None:
    assert all(1 <= len(method.points()) <= suite.MOST_POINTS for method in METHODS.values())


def test_settings_are_chosen_on_the_first_seed_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = {"scale": (0.1, 0.25, 0.5)}
    monkeypatch.setattr(suite, "METHODS", {"sum": Method("sum", "none", "sum", scales)})
    monkeypatch.setattr(suite, "TASKS", ("mnist", "fashion"))
    judged: list[str] = []

    def judge(weights: Mapping[str, Tensor], split: str) -> dict[str, float]:
        judged.append(split)
        apart = sum((weights[name] - AVERAGE[name]).norm().item() for name in BASE)
        return {"mnist": 1 / (1 + apart), "fashion": 0.5}

    def load(seed: int) -> Seed:
        return Seed(TUNED, BASE, judge)

    record = Record(tmp_path / "results.json", {})
    monkeypatch.setattr(suite, "_end", lambda *_: {"mnist": 0.9, "fashion": 0.9})
    with Progress(disable=True) as bar:
        suite.run((0, 1), load, record, bar)
        assert judged == ["validation"] * 3 + ["test"] * 2
        suite.run((0, 1), load, Record(tmp_path / "results.json", {}), bar)
    assert len(judged) == 5
    assert suite.best("sum", record) == {"scale": 0.25}
    text = suite.markdown(record, (0, 1))
    assert "| sum | none | 100.0 | 50.0 | 75.0 ± 0.0 | scale 0.25 |" in text
    assert "2 fine-tuning seeds" in text
