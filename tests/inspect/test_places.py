"""Stacks of layers that a model has beside each other are told apart."""

from __future__ import annotations

import pytest
import transformers

from cart_plugin.inspect import summary
from cart_plugin.inspect.places import places
from cart_plugin.inspect.state_dicts import records_of
from tests.support import random


def found(*names: str) -> list[tuple[int | None, str]]:
    return [(own.layer, own.module) for own in places(names).values()]


def test_an_encoder_and_a_decoder_are_told_apart() -> None:
    assert found(
        "shared.weight",
        "encoder.block.3.layer.0.SelfAttention.q.weight",
        "decoder.block.3.layer.0.SelfAttention.q.weight",
        "decoder.block.3.layer.1.EncDecAttention.q.weight",
    ) == [
        (None, "shared"),
        (3, "encoder.layer.SelfAttention.q"),
        (3, "decoder.layer.SelfAttention.q"),
        (3, "decoder.layer.EncDecAttention.q"),
    ]


def test_towers_of_text_and_images_are_told_apart() -> None:
    assert found(
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ) == [(0, "text_model.mlp.fc1"), (0, "vision_model.mlp.fc1")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            (
                "resnet.encoder.stages.0.layers.1.layer.0.convolution.weight",
                "resnet.encoder.stages.1.layers.1.layer.0.convolution.weight",
            ),
            [(1, "stages.0.layer.convolution"), (1, "stages.1.layer.convolution")],
        ),
        (
            ("layer1.0.conv1.weight", "layer2.0.conv1.weight"),
            [(0, "layer1.conv1"), (0, "layer2.conv1")],
        ),
        (
            ("stages.0.blocks.2.mlp.fc1.weight", "stages.1.blocks.2.mlp.fc1.weight"),
            [(2, "stages.0.mlp.fc1"), (2, "stages.1.mlp.fc1")],
        ),
    ],
)
def test_stages_are_told_apart(names: tuple[str, ...], expected: list[tuple[int, str]]) -> None:
    assert found(*names) == expected


def test_one_stack_and_its_experts_keep_short_names() -> None:
    assert found(
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "classifier.0.weight",
    ) == [
        (0, "mlp.experts.up_proj"),
        (0, "mlp.experts.up_proj"),
        (1, "self_attn.q_proj"),
        (0, "weight"),
    ]


def test_no_two_weights_of_t5_share_a_place() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=3, num_decoder_layers=3, **sizes)
    )
    own = places([name for name, one in model.named_parameters() if one.ndim == 2])
    assert len(set(own.values())) == len(own) > 30


def test_thirds_of_the_layers_are_those_of_one_stack() -> None:
    names = [f"{stack}.layers.{layer}.fc.weight" for stack in ("enc", "dec") for layer in range(3)]
    for held, count in ((names, 0), (names[:3], 3)):
        dicts = {str(seed): {name: random(12, 16, seed=seed) for name in held} for seed in (1, 2)}
        (movement, _) = summary.movements(list(records_of(dicts)), list(dicts))
        assert len(movement.depths) == count
