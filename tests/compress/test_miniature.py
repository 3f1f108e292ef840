"""Small models of the modules of large ones."""

from __future__ import annotations

import pytest
import torch
import transformers

from cart_plugin.compress.miniature import miniature


def _large(name: str, **settings):
    found = getattr(transformers, name)
    with torch.device("meta"):
        return found(found.config_class(**settings))  # the defaults are those of a published model


def _numbers(model) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("BertForSequenceClassification", "classifier"),
        ("ViTForImageClassification", "classifier"),
        ("LlamaForCausalLM", "model.layers.31.mlp.down_proj"),
        ("WhisperForConditionalGeneration", "model.encoder.conv1"),
        ("CLIPModel", "visual_projection"),
        ("Wav2Vec2ForCTC", "lm_head"),
        ("Qwen3MoeForCausalLM", "model.layers.23.mlp.experts"),
    ],
)
def test_a_published_model_has_a_small_one_that_answers(name, reached):
    model = _large(name)
    small = miniature(model)
    assert small is not None
    assert small.is_complete
    assert _numbers(small.model) < 2**25
    assert _numbers(small.model) < _numbers(model) / 50
    assert list(small.model.state_dict()) == list(model.state_dict())
    assert reached in small.reached
    answer = [tensor for run in small.runs for tensor in run.answer(small.model)]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in answer)


def test_the_large_model_stays_as_it_is():
    model = _large("BertModel")
    before = model.config.to_dict()
    assert miniature(model) is not None
    assert model.config.to_dict() == before
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


def test_what_the_whole_does_not_call_is_called_alone():
    settings = {"num_hidden_layers": 2}
    model = _large(
        "LlavaForConditionalGeneration",
        text_config={**settings, "model_type": "llama"},
        vision_config={**settings, "model_type": "clip_vision_model"},
    )
    small = miniature(model)
    assert small is not None
    assert [run.path for run in small.runs] == ["", "model.vision_tower"]
    assert "model.multi_modal_projector.linear_1" not in small.reached


def test_a_run_is_the_same_each_time():
    small = miniature(_large("BertModel"))
    assert small is not None
    (run,) = small.runs
    for one, other in zip(run.answer(small.model), run.answer(small.model), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_nobody_knows_how_to_feed_has_none(monkeypatch):
    monkeypatch.setattr("cart_plugin.compress.miniature.candidates", lambda _: iter(()))
    assert miniature(_large("BertModel")) is None
