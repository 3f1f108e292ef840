"""Tiny models of several tasks, on the disk, and what they answer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Of PEFT, on tied weights, on layers without biases, and of what it calls in transformers.
warnings.filterwarnings("ignore", module=r"peft\.")

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 32}
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_PATCHES = {**_SIZES, "image_size": 32, "patch_size": 16, "num_labels": 5}
_MIXTURE = {**_DECODER, "num_experts_per_tok": 2}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**_TEXT, "num_labels": 3}),
    "bare-bert": ("BertModel", _TEXT),
    "bert-mlm": ("BertForMaskedLM", _TEXT),
    "bare-vit": ("ViTModel", _PATCHES),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 5},
    ),
    "dinov2": ("Dinov2ForImageClassification", _PATCHES),
    "bare-dinov2": ("Dinov2Model", _PATCHES),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 64,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **_MIXTURE,
            "head_dim": 8,
            "num_local_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
    ),
    "glm": (
        "GlmForCausalLM",
        {**_DECODER, "head_dim": 8, "attention_bias": True, "pad_token_id": 0},
    ),
    "gpt-j": (
        "GPTJForCausalLM",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 64,
            "n_positions": 32,
            "rotary_dim": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "clip": ("CLIPVisionModelWithProjection", {**_PATCHES, "projection_dim": 16}),
    "llama": ("LlamaForCausalLM", _DECODER),
    "tied-llama": ("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**_MIXTURE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4},
    ),
    "roberta": ("RobertaForSequenceClassification", {**_TEXT, "num_labels": 3, "pad_token_id": 0}),
    "tagger": ("BertForTokenClassification", {**_TEXT, "num_labels": 3}),
    "resnet": (
        "ResNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "num_labels": 5,
        },
    ),
    "swin": (
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": 5,
        },
    ),
    "vit": ("ViTForImageClassification", _PATCHES),
}
MIXED = ("glm", "gpt-j", "qwen2", "swin")  # of which some layers have biases and some have none
TASKS = ("one", "two", "three")


def new_model(kind: str, **config: Any) -> Any:
    """A random model, everything in it random: norms and biases, too."""
    name, settings = KINDS[kind]
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**settings, **config}))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def save_tasks(
    folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, **config: Any
) -> list[Path]:
    """Models of three tasks: of one start, each with differences of falling singular values."""
    places = []
    for seed, task in enumerate(TASKS):
        model = new_model(kind, **config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(_difference(parameter.shape, generator))
        model.to(dtype).save_pretrained(folder / task, max_shard_size="20KB")
        places.append(folder / task)
    return places


def _difference(shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator) * 0.05
    if len(shape) != 2:
        return noise
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    return (left * values * 0.8 ** torch.arange(len(values))) @ right


def load(folder: Path, **options: Any) -> Any:
    """A model from its folder, by the class that its config names."""
    config = json.loads((folder / "config.json").read_text())
    return (
        getattr(transformers, config["architectures"][0]).from_pretrained(folder, **options).eval()
    )


def answer(model: nn.Module) -> Tensor:
    """What a model says to fixed inputs, in fp32."""
    generator = torch.Generator().manual_seed(7)
    inner: Any = model
    while hasattr(inner, "base_model") and not hasattr(inner, "main_input_name"):
        inner = inner.base_model
    if inner.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        inputs = {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    else:
        inputs = {"input_ids": torch.randint(1, 64, (2, 9), generator=generator)}
    with torch.no_grad():
        found = model(**inputs)
    kinds = ("logits", "image_embeds", "last_hidden_state")
    return next(found[kind] for kind in kinds if kind in found).float()


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
