"""Which differences between configs change what a model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from cart_plugin.checkpoints.configs import Difference, Meaning, differences
from cart_plugin.checkpoints.reading import Checkpoint


@pytest.mark.parametrize(
    "key",
    [
        *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
        *("rope_parameters.rope_theta", "rope_parameters.factor", "text_config.rope_scaling.type"),
        *("rms_norm_eps", "layer_norm_epsilon", "hidden_act", "activation_function"),
        *("sliding_window", "layer_types", "tie_word_embeddings", "num_experts_per_tok"),
        *("attn_logit_softcapping", "scale_attn_weights", "use_parallel_residual"),
        *("vision_config.patch_size", "norm_topk_prob", "vision_feature_layer"),
        # Beside records with names of the same beginning or end.
        *("attention_chunk_size", "conf_attention_chunk_size", "speech_encoder_chunk_size"),
        *("num_attention_heads_per_layer", "num_key_value_heads_per_layer", "attention_layers"),
        *("output_multiplier", "output_logit_soft_cap", "output_gate_type", "output_stride"),
        *("mask_decoder_config.hidden_act", "mask_downsampler_hidden_act", "token_dropout"),
        *("mask_downsampler_stride", "num_kv_shared_layers", "gradient_clipping", "attn_layers"),
    ],
)
def test_keys_of_the_computation(key: str) -> None:
    assert Difference(key, {}).meaning is Meaning.COMPUTATION


@pytest.mark.parametrize(
    "key",
    [
        *("attention_dropout", "attn_pdrop", "classifier_dropout", "drop_path_rate", "layerdrop"),
        *("initializer_range", "initializer_factor", "layer_scale_init_value", "use_cache"),
        *("id2label", "eos_token_id", "image_token_index", "router_aux_loss_coef"),
        *("output_hidden_states", "top_k", "max_length", "text_config.vocab_size"),
        *("num_hidden_layers", "n_layer", "max_window_layers", "pretraining_tp"),
    ],
)
def test_keys_of_records_and_sizes(key: str) -> None:
    assert Difference(key, {}).meaning is Meaning.RECORD


@pytest.mark.parametrize(
    "key",
    [
        *("max_position_embeddings", "chunk_size", "mask_type", "mask_downsampler_padding"),
        *("embedding_init_target", "router_jitter_noise", "accept_hidden_layer"),
    ],
)
def test_keys_that_nobody_knows(key: str) -> None:
    assert Difference(key, {}).meaning is Meaning.UNKNOWN


@pytest.mark.slow
def test_no_config_of_transformers_has_a_key_that_passes_for_a_record_unread() -> None:
    # What computes must not be in the list: what its values do was looked up for each of them.
    file = Path(__file__).with_name("record_keys.txt")
    found = set()
    for kind in set(transformers.CONFIG_MAPPING.values()):
        try:
            config = kind().to_dict()
        except Exception:  # some cannot do without a setting
            continue
        known = {key for key in keys(config) if not key.startswith("_")}  # those are not compared
        found |= {key for key in known if Difference(key, {}).meaning is Meaning.RECORD}
    assert len(found) > 300
    assert sorted(found - set(file.read_text().split())) == []


def keys(config: dict[str, Any]) -> set[str]:
    parts = [part for part in config.values() if isinstance(part, dict)]
    return set(map(str, config)).union(*map(keys, parts))


def differing(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    models = []
    for name, config in (("first", first), ("second", second)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        models.append(Checkpoint(name, folder / name, config))
    return [found.key for found in differences(models)]


LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
PARTS = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", **LAYERS},
    "vision_config": {"model_type": "siglip_vision_model", **LAYERS},
}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_what_a_parts_class_does_not_know_is_no_difference(part: str, tmp_path: Path) -> None:
    odd = {"qk_layer_norms": False, "rope_pattern_of_old": 6, "cache_implementation": "hybrid"}
    other = {**PARTS, part: {**PARTS[part], **odd}}  # type: ignore[dict-item]
    assert differing(tmp_path, PARTS, other) == []


def test_what_a_parts_class_does_know_is_one(tmp_path: Path) -> None:
    other = {**PARTS, "text_config": {**PARTS["text_config"], "rms_norm_eps": 1e-3}}  # type: ignore[dict-item]
    assert differing(tmp_path, PARTS, other) == ["text_config.rms_norm_eps"]


@pytest.mark.parametrize(
    ("model_type", "key", "value", "differs"),
    [
        ("mixtral", "head_dim", 8, False),
        ("mixtral", "head_dim", 16, True),
        ("nemotron", "num_key_value_heads", 4, False),
        ("nemotron", "num_key_value_heads", 2, True),
    ],
)
def test_nulls_stand_for_values(
    model_type: str, key: str, value: int, differs: bool, tmp_path: Path
) -> None:
    config = {"model_type": model_type, **LAYERS, key: None}
    found = differing(tmp_path, config, {**config, key: value})
    assert found == ([key] if differs else [])


def test_rope_as_older_versions_wrote_it(tmp_path: Path) -> None:
    config = {"model_type": "llama", **LAYERS}
    old = {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}
    assert differing(tmp_path, {**config, **old}, {**config, **new}) == []
