"""Tiny models of text, images and sound, by name: a class and the config that makes it small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

WORDS = 100
DECODER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MODERN = {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
_TOWER = {**_ENCODER, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_PAIR: dict[str, Any] = {"text_config": _TOWER, "vision_config": PATCHES}
_WAVES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        model: its class in transformers.
        settings: of its config, or of what makes one.
        config: makes the config in another way than the class's own.
        processor: writes a processor's files into a folder.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: Callable[..., Any] | None = None
    processor: Callable[[Any], object] | None = None

    def build(self) -> Any:
        """The model, with random weights, and counters as after a training of any length."""
        found = getattr(transformers, self.model)
        model = found((self.config or found.config_class)(**self.settings))
        for name, counter in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                counter.random_(1, 1000)
        return model


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


MODELS = {
    "Llama": Architecture("LlamaForCausalLM", DECODER),
    "Llama, tied": Architecture("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "Llama classifier": Architecture(
        "LlamaForSequenceClassification", {**DECODER, "num_labels": 3}
    ),
    "Llama, bare": Architecture("LlamaModel", DECODER),
    "Mistral": Architecture("MistralForCausalLM", DECODER),
    "Qwen2, tied": Architecture("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "Qwen2 tagger": Architecture("Qwen2ForTokenClassification", {**DECODER, "num_labels": 3}),
    "Qwen3": Architecture("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
    "Qwen3, bare": Architecture("Qwen3Model", {**DECODER, "head_dim": 16}),
    "Gemma": Architecture("GemmaForCausalLM", {**DECODER, "head_dim": 12}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", {**DECODER, "head_dim": 12}),
    "Gemma 3 (text)": Architecture("Gemma3ForCausalLM", {**DECODER, "head_dim": 12}),
    "Phi-2": Architecture("PhiForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    "Phi-3": Architecture("Phi3ForCausalLM", DECODER),
    "OLMo 2": Architecture("Olmo2ForCausalLM", DECODER),
    "Cohere": Architecture("CohereForCausalLM", DECODER),
    "Granite": Architecture("GraniteForCausalLM", DECODER),
    "StarCoder 2": Architecture("Starcoder2ForCausalLM", DECODER),
    "StableLM": Architecture("StableLmForCausalLM", {**DECODER, "hidden_size": 64}),
    "GLM-4": Architecture("Glm4ForCausalLM", {**DECODER, "head_dim": 12}),
    "SmolLM 3": Architecture("SmolLM3ForCausalLM", DECODER),
    "Falcon (7B)": Architecture(
        "FalconForCausalLM",
        {
            **_without(DECODER, "num_key_value_heads", "intermediate_size"),
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
        },
    ),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", _without(DECODER, "num_key_value_heads")),
    "OPT": Architecture(
        "OPTForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "BLOOM": Architecture(
        "BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    ),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
        },
    ),
    "RWKV": Architecture(
        "RwkvForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "context_length": 64,
        },
    ),
    "LFM2": Architecture("Lfm2ForCausalLM", {**DECODER, "layer_types": ["conv", "full_attention"]}),
    "Mixtral": Architecture(
        "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 12}),
    "OLMoE": Architecture("OlmoeForCausalLM", _without(_EXPERTS, "moe_intermediate_size")),
    "GPT-OSS": Architecture(
        "GptOssForCausalLM",
        {
            **DECODER,
            "hidden_size": 32,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "DeepSeek-V3": Architecture(
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "Qwen3-Next": Architecture(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "hidden_size": 32,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "T5 1.0": Architecture("T5ForConditionalGeneration", _T5),
    "Flan-T5": Architecture(
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "BART": Architecture("BartForConditionalGeneration", _BART),
    "BART classifier": Architecture("BartForSequenceClassification", {**_BART, "num_labels": 3}),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            **_without(_BART, "max_position_embeddings", "forced_eos_token_id"),
            "num_mel_bins": 16,
            "max_source_positions": 50,
            "max_target_positions": 32,
        },
    ),
    "BERT, bare": Architecture("BertModel", _ENCODER),
    "BERT classifier": Architecture("BertForSequenceClassification", {**_ENCODER, "num_labels": 3}),
    "BERT masked": Architecture("BertForMaskedLM", _ENCODER),
    "RoBERTa, bare": Architecture("RobertaModel", _ENCODER),
    "RoBERTa classifier": Architecture(
        "RobertaForSequenceClassification", {**_ENCODER, "num_labels": 3}
    ),
    "RoBERTa tagger": Architecture("RobertaForTokenClassification", {**_ENCODER, "num_labels": 3}),
    "XLM-R classifier": Architecture(
        "XLMRobertaForSequenceClassification", {**_ENCODER, "num_labels": 3}
    ),
    "DistilBERT classifier": Architecture(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": WORDS,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
    ),
    "ELECTRA classifier": Architecture(
        "ElectraForSequenceClassification", {**_ENCODER, "embedding_size": 16, "num_labels": 3}
    ),
    "DeBERTa classifier": Architecture(
        "DebertaForSequenceClassification",
        {
            **_ENCODER,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
            "max_relative_positions": 16,
        },
    ),
    "DeBERTa-v2 classifier": Architecture(
        "DebertaV2ForSequenceClassification",
        {
            **_ENCODER,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "ModernBERT masked": Architecture("ModernBertForMaskedLM", _MODERN),
    "ModernBERT classifier": Architecture(
        "ModernBertForSequenceClassification", {**_MODERN, "num_labels": 3}
    ),
    "MPNet, bare": Architecture("MPNetModel", _ENCODER),
    "ViT, bare": Architecture("ViTModel", PATCHES),
    "ViT classifier": Architecture("ViTForImageClassification", {**PATCHES, "num_labels": 3}),
    "DINOv2, bare": Architecture("Dinov2Model", _without(PATCHES, "intermediate_size")),
    "DINOv2 classifier": Architecture(
        "Dinov2ForImageClassification", {**_without(PATCHES, "intermediate_size"), "num_labels": 3}
    ),
    "BEiT classifier": Architecture(
        "BeitForImageClassification",
        {**PATCHES, "vocab_size": WORDS, "num_labels": 3, "use_relative_position_bias": True},
    ),
    "DeiT classifier": Architecture("DeiTForImageClassification", {**PATCHES, "num_labels": 3}),
    "Swin classifier": Architecture(
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": 3,
        },
    ),
    "ConvNeXt classifier": Architecture(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "num_labels": 3},
    ),
    "ResNet classifier": Architecture(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
    ),
    "CLIP": Architecture("CLIPModel", {**_PAIR, "projection_dim": 16}),
    "CLIP vision": Architecture("CLIPVisionModel", PATCHES),
    "CLIP vision, projected": Architecture(
        "CLIPVisionModelWithProjection", {**PATCHES, "projection_dim": 16}
    ),
    "SigLIP": Architecture("SiglipModel", _PAIR),
    "SigLIP vision": Architecture("SiglipVisionModel", PATCHES),
    "SigLIP classifier": Architecture("SiglipForImageClassification", {**_PAIR, "num_labels": 3}),
    "Wav2Vec2, bare": Architecture("Wav2Vec2Model", _WAVES),
    "Wav2Vec2 CTC": Architecture("Wav2Vec2ForCTC", _WAVES),
    "HuBERT classifier": Architecture(
        "HubertForSequenceClassification", {**_WAVES, "num_labels": 3}
    ),
}
"""Models of one mode, and pairs of towers, by the names of the table."""
