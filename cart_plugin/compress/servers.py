"""Servers other than PEFT: the layout that they take, and who loads what has been written.

Read off, and tried with (`make test-servers`), vLLM 0.32's `peft_helper.py`, SGLang 0.5.23's
`lora.py`, `utils.py` and `mem_pool.py`, and llama.cpp's `convert_lora_to_gguf.py` (of
llama-cpp-python 0.3.36). All take A and B of linear layers. vLLM before 0.32 and SGLang know one
rank; llama.cpp knows one alpha and divides it by the rank of each layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

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

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; 16 unless set."""

# Of what is stored whole, llama.cpp's converter takes norms, and its run time leaves them out.
_LLAMA_NORM = re.compile(r"\.norm|_layernorm")
# SGLang looks at tensors of layers, and fails on those that it does not know.
_LAYER = re.compile(r"layers\.\d+\.")
# Layers that servers compute as one, and what SGLang 0.5.23 needs to be there with each of them.
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_KINDS = {
    "transposed": "Conv1D layers",
    "convolution": "convolutions",
    "experts": "stacked experts",
    "transposed experts": "stacked experts",
}


@dataclass(frozen=True)
class Loader:
    """What loads the adapters, or does not.

    Attributes:
        name: of the program.
        loads: whether it answers as `expand`'s model does; None where that has not been tried.
        hint: what it has to be told, or its version.
        reasons: why it does not load them, or why nobody knows.
        silent: whether it takes them all the same, and answers wrongly without a word.
    """

    name: str
    loads: bool | None
    hint: str = ""
    reasons: tuple[str, ...] = ()
    silent: bool = False

    @property
    def told(self) -> str:
        """Its name, and the hint behind it."""
        return f"{self.name} ({self.hint})" if self.hint else self.name


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
    held = _common(assignment)
    highest = max(rank for ranks in all_ranks for rank in ranks.values())
    uneven = any(len({rank for rank in ranks.values() if rank}) > 1 for ranks in all_ranks)
    allowed = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    vllm, sglang, llama = list(held), list(held), list(held)
    if allowed is None:
        vllm.append(f"it allows ranks up to {VLLM_RANKS[-1]}, and here is one of {highest}")
    vllm_hint = f"--max-lora-rank {allowed}"
    if uneven:
        vllm_hint = f"0.32 or later, {vllm_hint}"
        sglang.append("it takes one rank for all layers, and these have several")
    modules = structure.modules
    if any(isinstance(peft_files.targets(assignment, ranks, modules), str) for ranks in all_ranks):
        sglang.append("it takes no regular expression as target_modules")
    lonely = [name for ranks in all_ranks for name in _lonely(assignment, ranks)]
    if lonely:
        sglang.append(f"it fuses layers, and misses those that belong to {min(lonely)}")
    whole = list(assignment.exact)
    # Nothing else keeps them from loading, and these tensors the server leaves out.
    alone = bool(whole) and len(held) == 1 and peft_files.task_type(architecture) == "CAUSAL_LM"
    skips = alone and len(sglang) == 1 and not any(_LAYER.search(name) for name in whole)
    drops = alone and all(_LLAMA_NORM.search(name) for name in whole)
    silent = [f"it leaves out {_some(whole)} without a word: a wrong model"] if whole else []
    sglang_hint = f"--max-lora-rank {highest}"
    return [
        Loader("PEFT", True),
        _loader("vLLM", vllm, architecture, vllm_hint),
        _loader("SGLang", silent if skips else sglang, architecture, sglang_hint, skips),
        _loader("llama.cpp", silent if drops else llama, architecture, silent=drops),
    ]


def summary(found: Sequence[Loader]) -> str:
    """One line: who loads the adapters, who does not, and what has not been tried."""
    parts = [f"loaded by {', '.join(loader.told for loader in found if loader.loads)}"]
    refused = [loader.name for loader in found if loader.loads is False]
    if refused:
        parts.append(f"not by {', '.join(refused)} (report.json says why)")
    untried = [loader.name for loader in found if loader.loads is None]
    if untried:
        parts.append(f"not tried with {', '.join(untried)}")
    return "; ".join(parts)


def _loader(
    name: str, reasons: list[str], architecture: str, hint: str = "", silent: bool = False
) -> Loader:
    if reasons:
        return Loader(name, False, reasons=tuple(reasons), silent=silent)
    if architecture not in TRIED[name]:
        why = f"the adapters have the form that it takes, but {architecture} has not been tried"
        return Loader(name, None, hint, (why,))
    return Loader(name, True, hint)


def _common(assignment: Assignment) -> list[str]:
    """What none of the servers takes."""
    reasons = []
    layers = assignment.lora.values()
    if assignment.exact:
        reasons.append(
            f"it takes no modules stored whole (modules_to_save): {_some(list(assignment.exact))}"
        )
    if assignment.has_bias:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        reasons.append(f"it takes no biases: {_some(biases)}")
    experts = [layer.name for layer in layers if layer.is_parameter]
    if experts:
        reasons.append(f"stacked experts have not been seen to load: {_some(experts)}")
    others = [layer.name for layer in layers if layer.kind in ("transposed", "convolution")]
    if others:
        reasons.append(f"it takes linear layers only: {_some(others)}")
    return reasons


def _some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    more = len(names) - 1
    return names[0] if not more else f"{names[0]} and {more} more"


def _lonely(assignment: Assignment, ranks: Mapping[str, int]) -> list[str]:
    """Layers of an adapter that lack one which SGLang wants with them."""
    held = {layer.module for name, layer in assignment.lora.items() if ranks[name]}
    found = []
    for module in held:
        parent, _, leaf = module.rpartition(".")
        needed = _NEEDS.get(leaf)
        if needed is not None and f"{parent}.{needed}" not in held:
            found.append(module)
    return found
