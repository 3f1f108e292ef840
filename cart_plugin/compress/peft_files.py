"""Adapters as PEFT reads them: the config, and the names of the tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch

from cart_plugin.checkpoints.adapters import PREFIX, plain_config
from cart_plugin.checkpoints.files import json_text
from cart_plugin.compress.layers import Assignment, Layer
from cart_plugin.errors import CartError

Ranks = Mapping[str, int]
"""Rank by the layer's name; layers of rank 0 are left out."""


def not_empty(layers: Collection[Layer], ranks: Ranks) -> dict[str, int]:
    """The ranks, with 1 for the cheapest layer where all are 0: PEFT loads nothing without LoRA."""
    if any(ranks.values()):
        return dict(ranks)
    return {**ranks, min(layers, key=lambda layer: layer.direction).name: 1}


def tensor_layout(
    assignment: Assignment, ranks: Ranks, dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each LoRA tensor of an adapter, by its name in the file."""
    layout = {}
    for name, layer in assignment.lora.items():
        if not ranks[name]:
            continue
        a, b = layer.lora_shapes(ranks[name])
        layout[lora_name(layer, "A")] = (dtypes[name], a)
        layout[lora_name(layer, "B")] = (dtypes[name], b)
        if assignment.has_bias and not layer.is_parameter:
            layout[bias_name(layer)] = (dtypes[name], (layer.matrices[1],))
    return layout


def lora_name(layer: Layer, side: str) -> str:
    """The file's name of a layer's A or B."""
    return f"{PREFIX}{layer.prefix}.lora_{side}.weight"


def bias_name(layer: Layer) -> str:
    """The file's name of a layer's bias."""
    return f"{PREFIX}{layer.prefix}.lora_B.bias"


def exact_name(name: str) -> str:
    """The file's name of a tensor that is stored as it is."""
    return f"{PREFIX}{name}"


def folded(ranks: Ranks) -> dict[str, float]:
    """By how much each layer's B (and bias) is larger than the difference needs it, by its name.

    PEFT, vLLM and llama.cpp scale ``B A`` by ``lora_alpha / rank of the layer``, and only the first
    two know of an alpha for a layer. With one alpha for all, B makes up for that.
    """
    usual = _usual(ranks)
    return {name: rank / usual for name, rank in ranks.items()}


def scaling(settings: Mapping[str, Any], layer: Layer, rows: int) -> float:
    """What ``B A`` and the bias of a layer are multiplied by on loading: alpha by rank.

    Args:
        settings: the adapter's config.
        layer: the layer.
        rows: of its A, the directions of all its matrices.

    Raises:
        CartError: the config names no alpha.
    """
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise CartError(
            f"adapter_config.json gives {layer.name} no lora_alpha but {alpha!r}; run "
            "`mergekit-cart compress` again"
        )
    return alpha / (rows // layer.matrices[0])


def config_text(
    assignment: Assignment,
    ranks: Ranks,
    modules: Collection[str],
    base: str,
    task_type: str | None,
    auto_mapping: Mapping[str, str],
) -> str:
    """The text of an adapter_config.json.

    Args:
        assignment: what the adapter holds.
        ranks: of its layers.
        modules: names of all modules of the model.
        base: the base model's folder.
        task_type: PEFT's, if the architecture has one.
        auto_mapping: the base's class and module, by which PEFT's automatic classes load models
            without a task type, such as classifiers.
    """
    config = lora_config(assignment, ranks, modules, task_type)
    if task_type is None:
        config.auto_mapping = dict(auto_mapping)
    config.base_model_name_or_path = base
    config.inference_mode = True
    return json_text(plain_config(config), sort_keys=True)


def task_type(architecture: str) -> str | None:
    """PEFT's task type of an architecture: only where it changes nothing in what is loaded.

    That of classifiers makes PEFT expect a head in every adapter; its automatic classes load them
    by ``auto_mapping``.
    """
    return "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None


def lora_config(
    assignment: Assignment, ranks: Ranks, modules: Collection[str], task_type: str | None
) -> Any:
    """PEFT's config of an adapter; arguments as of `config_text`."""
    from peft import LoraConfig

    layers = [layer for name, layer in assignment.lora.items() if ranks[name]]
    usual = _usual(ranks)
    pattern = {
        pattern_key(layer): ranks[layer.name] for layer in layers if ranks[layer.name] != usual
    }
    parameters = sorted(layer.name for layer in layers if layer.is_parameter)
    return LoraConfig(
        r=usual,
        lora_alpha=usual,  # and so everywhere: `folded`
        rank_pattern=pattern,
        target_modules=targets(assignment, ranks, modules),
        target_parameters=parameters or None,
        modules_to_save=assignment.saved or None,
        fan_in_fan_out=any(layer.kind == "transposed" for layer in layers),
        lora_bias=assignment.has_bias,
        lora_dropout=0.0,
        task_type=task_type,
    )


def _usual(ranks: Ranks) -> int:
    """The rank of most layers."""
    counts = Counter(rank for rank in ranks.values() if rank)
    return counts.most_common(1)[0][0] if counts else 1


def pattern_key(layer: Layer) -> str:
    """A layer in a pattern, whose keys PEFT takes for regular expressions: this is one name."""
    return f"^{re.escape(layer.name if layer.is_parameter else layer.module)}"


def targets(assignment: Assignment, ranks: Ranks, modules: Collection[str]) -> list[str] | str:
    """Full names; where PEFT would take another module for one of them, a regular expression."""
    layers = [layer for name, layer in assignment.lora.items() if ranks[name]]
    names = sorted({layer.module for layer in layers if not layer.is_parameter})
    ends = tuple(f".{name}" for name in names)
    if any(module.endswith(ends) and module not in names for module in modules):
        return "|".join(re.escape(name) for name in names)
    return names
