"""Tiny random checkpoints of real architectures, saved as people save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT_ENCODER = {**_ENCODER, "vocab_size": 64, "max_position_embeddings": 32}
_DECODER = {
    **_ENCODER,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}
_PATCHES = {**_ENCODER, "image_size": 32, "patch_size": 16}
_EXPERTS = {**_DECODER, "num_hidden_layers": 2, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "bert": ("BertModel", _TEXT_ENCODER),
    "bert-classifier": ("BertForSequenceClassification", _TEXT_ENCODER),
    "roberta": ("RobertaModel", _TEXT_ENCODER),
    "roberta-classifier": ("RobertaForSequenceClassification", _TEXT_ENCODER),
    "vit": ("ViTModel", _PATCHES),
    "dinov2": ("Dinov2Model", {k: v for k, v in _PATCHES.items() if k != "intermediate_size"}),
    "clip-vision": ("CLIPVisionModel", _PATCHES),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": 24, "num_experts": 4},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {k: v for k, v in {**_EXPERTS, "num_local_experts": 4}.items() if k != "head_dim"},
    ),
}


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {
    **{key: size for key, size in SIZES.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
}
MISTRAL3 = {
    "text_config": transformers.MistralConfig(**SIZES, num_key_value_heads=2, head_dim=8),
    "vision_config": transformers.PixtralVisionConfig(**_VISION),
    "image_token_index": 60,
}
LLAVA = {
    "text_config": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "vision_config": transformers.CLIPVisionConfig(**_VISION),
    "image_token_index": 60,
}


def save_class(folder: Path, name: str, original: bool = True, **config: Any) -> list[str]:
    """Save three random models of a class; their folders."""
    kind = getattr(transformers, name)
    folders = [folder / f"{name}-{seed}" for seed in range(3)]
    for seed, model in enumerate(folders):
        torch.manual_seed(seed)
        kind(kind.config_class(**config)).save_pretrained(model, save_original_format=original)
    return list(map(str, folders))


def save_model(
    folder: Path, architecture: str, seed: int, *, original_format: bool = True, **config: Any
) -> Path:
    """Save a random model of a tiny architecture; its folder."""
    name, settings = ARCHITECTURES[architecture]
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**settings, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and special tokens start equal: a merge of them would show nothing.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder, save_original_format=original_format)
    return folder


def save_models(folder: Path, architecture: str, count: int = 3, **kwargs: Any) -> list[str]:
    """Save several random models of one architecture; their paths."""
    return [
        str(save_model(folder / f"{architecture}-{seed}", architecture, seed, **kwargs))
        for seed in range(count)
    ]


def write_recipe(file: Path, folders: list[str], **recipe: Any) -> Path:
    """Write a recipe that merges folders with cart, but for the keys given."""
    defaults = {"merge_method": "cart", "models": [{"model": folder} for folder in folders]}
    file.write_text(yaml.safe_dump({**defaults, **recipe}), encoding="utf-8")
    return file


def load_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def change_config(folder: str | Path, **changes: Any) -> None:
    """Change keys of a model's config.json; None deletes one."""
    file = Path(folder) / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model in place."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def save_tokenizer(folder: str, size: int, added: int = 0, *, backwards: bool = False) -> None:
    """Save a tokenizer with ids below a number, and some more; `<0>` has the first or the last."""
    order = reversed(range(size)) if backwards else range(size)
    vocabulary = {f"<{number}>": place for place, number in enumerate(order)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>")
    fast.add_tokens([f"<more {number}>" for number in range(added)])
    fast.save_pretrained(folder)
