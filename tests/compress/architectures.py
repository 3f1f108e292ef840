"""Tiny models whose layers PEFT does not wrap as others', and what they are fed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.compress.models import _DECODER, _PATCHES, _SIZES

_WAVES = {
    **_SIZES,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "num_labels": 3,
}
_XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
_TEXT = {**_DECODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclass(frozen=True)
class Case:
    """A class, its config, what its forward takes, and what is expected of some tensors.

    Attributes:
        model: the class in transformers.
        settings: of its config.
        kind: of its inputs: "text", "images", "waves", "speech".
        whole: ends of the names of tensors that LoRA must not hold.
        lora: ends of the names of tensors that it must.
    """

    model: str
    settings: dict[str, Any]
    kind: str = "text"
    whole: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()

    def inputs(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        words = torch.randint(3, 60, (2, 7), generator=random)
        if self.kind == "speech":
            return {"input_features": noise(2, 16, 100), "decoder_input_ids": words}
        if self.kind == "waves":
            return {"input_values": noise(2, 2000)}
        return (
            {"pixel_values": noise(2, 3, 32, 32)} if self.kind == "images" else {"input_ids": words}
        )

    def answer(self, model: Any) -> Tensor:
        """The first output of a model."""
        with torch.no_grad():
            found = model(**self.inputs())
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if getattr(found, name, None) is not None:
                return getattr(found, name).float()
        raise AssertionError(found.keys())

    def load(self, folder: Path) -> Any:
        return getattr(transformers, self.model).from_pretrained(folder).eval()


CASES = {
    "whisper": Case(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 50,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        "speech",
        whole=("encoder.conv1.weight", "encoder.conv2.weight"),
        lora=("fc1.weight", "q_proj.weight"),
    ),
    "siglip": Case(
        "SiglipVisionModel",
        {k: v for k, v in _PATCHES.items() if k != "num_labels"},
        "images",
        whole=("head.attention.out_proj.weight",),
        lora=("self_attn.out_proj.weight",),
    ),
    "wav2vec2": Case(
        "Wav2Vec2ForCTC",
        _WAVES,
        "waves",
        whole=("parametrizations.weight.original1",),
        lora=("intermediate_dense.weight",),
    ),
    "hubert": Case(
        "HubertForSequenceClassification",
        _WAVES,
        "waves",
        whole=("parametrizations.weight.original1",),
        lora=("intermediate_dense.weight",),
    ),
    "beit": Case(
        "BeitForImageClassification",
        {**_PATCHES, "vocab_size": 64, "use_relative_position_bias": True},
        "images",
        lora=("attention.q_proj.weight",),
    ),
    "xlnet": Case("XLNetForSequenceClassification", {**_XLNET, "num_labels": 3}, lora=(".q",)),
    "mamba": Case(
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        whole=("out_proj.weight", "dt_proj.weight"),
        lora=("in_proj.weight", "x_proj.weight"),
    ),
    "jamba": Case(
        "JambaForCausalLM",
        {
            **_TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        whole=("dt_proj.weight",),
        lora=("q_proj.weight", "experts.down_proj"),
    ),
    "falcon-h1": Case(
        "FalconH1ForCausalLM",
        {
            **_TEXT,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        whole=("mamba.out_proj.weight",),
        lora=("q_proj.weight",),
    ),
    "nemotron-h": Case(
        "NemotronHForCausalLM",
        {
            **_TEXT,
            "hybrid_override_pattern": "M*-E",
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        whole=("0.mixer.out_proj.weight",),
        lora=("q_proj.weight",),
    ),
    "llama4": Case(
        "Llama4ForCausalLM",
        {
            **_TEXT,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
        lora=("q_proj.weight", "router.weight"),
    ),
    "phimoe": Case(
        "PhimoeForCausalLM",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        lora=("q_proj.weight", "router.weight"),
    ),
    "deepseek-v3": Case(
        "DeepseekV3ForCausalLM",
        {
            **_TEXT,
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
        lora=("layers.0.mlp.gate_proj.weight", "shared_experts.down_proj.weight"),
    ),
    # PEFT renames these shared experts on loading, and then has no place for them.
    "laguna": Case(
        "LagunaForCausalLM",
        {
            **_TEXT,
            **_EXPERTS,
            "shared_expert_intermediate_size": 48,
        },
        whole=("shared_experts.gate_proj.weight",),
        lora=("q_proj.weight", "experts.down_proj"),
    ),
    # Its router is one of the parameters that PEFT looks for in no pattern of modules.
    "afmoe": Case(
        "AfmoeForCausalLM",
        {**_TEXT, **_EXPERTS, "num_dense_layers": 1},
        lora=("q_proj.weight", "router.gate.weight", "shared_experts.down_proj.weight"),
    ),
    # Old names that its files do not have are not to come back.
    "qwen3-vl-moe": Case(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "num_experts_per_tok": 2,
                "num_local_experts": 4,
                "moe_intermediate_size": 48,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [1],
            },
        },
        lora=("self_attn.q_proj.weight", "experts.down_proj"),
    ),
    # A learned query of three dimensions is no stack of experts.
    "granite-speech": Case(
        "GraniteSpeechForConditionalGeneration",
        {
            "text_config": _TEXT,
            "encoder_config": {"num_layers": 2, "hidden_dim": 32, "num_heads": 4, "dim_head": 8},
            "projector_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
            },
        },
        lora=("self_attn.q_proj.weight",),
    ),
}


def save(folder: Path, case: Case) -> list[Path]:
    """Models of two tasks that differ in each value, signs of vectors aside."""
    found = getattr(transformers, case.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = found(found.config_class(**case.settings))
        for parameter in start.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        places = []
        for seed, task in enumerate(("one", "two"), 1):
            torch.manual_seed(seed)
            model = copy.deepcopy(start)
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
                else:
                    noise = torch.randn_like(parameter)
                    parameter.data.add_(noise, alpha=0.3 * float(parameter.data.std()))
            places.append(folder / task)
            model.save_pretrained(places[-1])
    return places
