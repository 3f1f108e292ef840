"""Servers other than PEFT: the layout that they take, and who loads what has been written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn

from cart_plugin.checkpoints import servers
from cart_plugin.checkpoints.servers import Contents, Loader
from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Assignment, Structure
from cart_plugin.errors import CartError

Layout = Literal["peft", "servers"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

_DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TRIED = {
    "vLLM": _DENSE,  # of mixtures of experts its LoRA needs a GPU
    "SGLang": (*_DENSE, "MixtralForCausalLM"),
    "llama.cpp": (*_DENSE, "MixtralForCausalLM"),
}
"""The architectures that `make test-servers` runs in each of the servers."""

_KINDS = {
    "transposed": "Conv1D layers",
    "convolution": "convolutions",
    "experts": "stacked experts",
    "transposed experts": "stacked experts",
}


def checked_layout(layout: str) -> Layout:
    """A layout by its name.

    Raises:
        CartError: there is none of that name.
    """
    if layout == "servers":
        return "servers"
    if layout == "peft":
        return "peft"
    raise CartError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def unfit_modules(structure: Structure) -> dict[str, str]:
    """The modules whose LoRA servers do not take, all but linear ones, and why."""
    layers = (structure.layer(name) for name in structure.state)
    return {
        layer.module: "servers take LoRA of linear layers alone"
        for layer in layers
        if layer is not None and layer.kind != "linear"
    }


def why_left(structure: Structure, name: str) -> str:
    """Why the servers' layout leaves a tensor at the base."""
    module, _, leaf = name.rpartition(".")
    owner = structure.modules.get(module)
    layer = structure.layer(name)
    if leaf == "bias":
        what = "biases"
    elif isinstance(owner, nn.Embedding):
        what = "embeddings"
    elif structure.is_head(name):
        what = "heads"
    elif layer is not None and layer.kind == "linear":
        return "PEFT gives its module no LoRA"
    elif layer is not None:
        what = _KINDS[layer.kind]
    elif len(structure.state[name].shape) < 2:
        what = "norms and other vectors"
    else:
        what = "matrices of no linear layer"
    return f"servers take no {what}"


def one_rank(all_ranks: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """Each task's largest rank for all its layers, at least 1.

    A layer that has not as many directions is padded with zeros.
    """
    return [dict.fromkeys(ranks, max([1, *ranks.values()])) for ranks in all_ranks]


def loaders(
    structure: Structure,
    assignment: Assignment,
    all_ranks: Sequence[Mapping[str, int]],
    architecture: str,
) -> list[Loader]:
    """Who loads adapters of a plan, PEFT first.

    Args:
        structure: the model's.
        assignment: what the adapters hold.
        all_ranks: one task's ranks each.
        architecture: as the base's config names it.
    """
    modules = structure.modules
    layers = assignment.lora.values()
    held = Contents(
        modules=[
            {layer.module for name, layer in assignment.lora.items() if ranks[name]}
            for ranks in all_ranks
        ],
        rank=max(rank for ranks in all_ranks for rank in ranks.values()),
        whole=list(assignment.exact),
        biases=[layer.bias for layer in layers if layer.bias is not None],
        experts=[layer.name for layer in layers if layer.is_parameter],
        others=[layer.name for layer in layers if layer.kind in ("transposed", "convolution")],
        is_uneven=any(len({rank for rank in ranks.values() if rank}) > 1 for ranks in all_ranks),
        has_expression=any(
            isinstance(peft_files.targets(assignment, ranks, modules), str) for ranks in all_ranks
        ),
        is_causal=peft_files.task_type(architecture) == "CAUSAL_LM",
    )

    def untried(name: str) -> str:
        if architecture in TRIED[name]:
            return ""
        return f"the adapters have the form that it takes, but {architecture} has not been tried"

    return servers.loaders(held, untried)
