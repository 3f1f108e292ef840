"""Which differences between configs change what a model does."""

from __future__ import annotations

import pytest

from cart_plugin.checkpoints.configs import Difference, Meaning


@pytest.mark.parametrize(
    "key",
    [
        *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
        *("rope_parameters.rope_theta", "rope_parameters.factor", "text_config.rope_scaling.type"),
        *("rms_norm_eps", "layer_norm_epsilon", "hidden_act", "activation_function"),
        *("sliding_window", "layer_types", "tie_word_embeddings", "num_experts_per_tok"),
        *("attn_logit_softcapping", "scale_attn_weights", "use_parallel_residual"),
        *("vision_config.patch_size", "norm_topk_prob", "vision_feature_layer"),
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


def test_keys_that_nobody_knows() -> None:
    assert Difference("max_position_embeddings", {}).meaning is Meaning.UNKNOWN
