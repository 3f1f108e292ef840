"""Programs that load adapters, and what of an adapter each of them takes.

Read off, and tried with (`make test-servers`), vLLM 0.32's `peft_helper.py`, SGLang 0.5.23's
`lora.py`, `utils.py` and `mem_pool.py`, and llama.cpp's `convert_lora_to_gguf.py` (of
llama-cpp-python 0.3.36). All take A and B of linear layers. vLLM before 0.32 and SGLang know one
rank; llama.cpp knows one alpha and divides it by the rank of each layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; 16 unless set."""

# Of what is stored whole, llama.cpp's converter takes norms, and its run time leaves them out.
_LLAMA_NORM = re.compile(r"\.norm|_layernorm")
# SGLang looks at tensors of layers, and fails on those that it does not know.
_LAYER = re.compile(r"layers\.\d+\.")
# Layers that servers compute as one, and what SGLang 0.5.23 needs to be there with each of them.
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Loader:
    """What loads adapters, or does not.

    Attributes:
        name: of the program.
        loads: whether it answers as PEFT does; None where that has not been tried.
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

    def document(self) -> dict[str, Any]:
        """For JSON: `loads` is null where that has not been tried."""
        found: dict[str, Any] = {"loads": self.loads}
        if self.hint:
            found["with"] = self.hint
        if self.reasons:
            found["why"] = list(self.reasons)
        return found


@dataclass(frozen=True)
class Contents:
    """What adapters hold, by names.

    Attributes:
        modules: each adapter's linear layers that have LoRA.
        rank: the largest of a layer.
        whole: tensors that take the place of the base's.
        biases: those of B.
        experts: stacked ones that have LoRA.
        others: other layers that have LoRA and are not linear.
        is_uneven: whether an adapter has several ranks.
        has_expression: whether its target_modules is a regular expression.
        is_causal: whether the base is a language model.
    """

    modules: Sequence[Collection[str]]
    rank: int
    whole: Sequence[str] = ()
    biases: Sequence[str] = ()
    experts: Sequence[str] = ()
    others: Sequence[str] = ()
    is_uneven: bool = False
    has_expression: bool = False
    is_causal: bool = True


def loaders(held: Contents, untried: Callable[[str], str]) -> list[Loader]:
    """Who loads adapters, PEFT first.

    Args:
        held: what they hold.
        untried: takes a program's name; returns why nobody knows whether it loads adapters that
            have its form, or nothing.
    """
    common = _common(held)
    allowed = next((rank for rank in VLLM_RANKS if rank >= held.rank), None)
    vllm, sglang, llama = list(common), list(common), list(common)
    if allowed is None:
        vllm.append(f"it allows ranks up to {VLLM_RANKS[-1]}, and here is one of {held.rank}")
    vllm_hint = f"--max-lora-rank {allowed}"
    if held.is_uneven:
        vllm_hint = f"0.32 or later, {vllm_hint}"
        sglang.append("it takes one rank for all layers, and these have several")
    if held.has_expression:
        sglang.append("it takes no regular expression as target_modules")
    lonely = [name for modules in held.modules for name in _lonely(modules)]
    if lonely:
        sglang.append(f"it fuses layers, and misses those that belong to {min(lonely)}")
    # Nothing else keeps them from loading, and these tensors the server leaves out.
    alone = bool(held.whole) and len(common) == 1 and held.is_causal
    skips = alone and len(sglang) == 1 and not any(_LAYER.search(name) for name in held.whole)
    drops = alone and all(_LLAMA_NORM.search(name) for name in held.whole)
    silent = [f"it leaves out {_some(held.whole)} without a word: a wrong model"] if alone else []
    found = [Loader("PEFT", True)]
    for name, reasons, hint, is_silent in (
        ("vLLM", vllm, vllm_hint, False),
        ("SGLang", sglang, f"--max-lora-rank {held.rank}", skips),
        ("llama.cpp", llama, "", drops),
    ):
        if reasons:
            why = tuple(silent if is_silent else reasons)
            found.append(Loader(name, False, reasons=why, silent=is_silent))
        elif unknown := untried(name):
            found.append(Loader(name, None, hint, (unknown,)))
        else:
            found.append(Loader(name, True, hint))
    return found


def summary(found: Sequence[Loader], condition: str = "") -> str:
    """One line: who loads adapters, who does not, and what has not been tried.

    Args:
        found: PEFT first.
        condition: of those who load them, for all but PEFT.
    """
    first, *others = [loader.told for loader in found if loader.loads]
    if condition and others:
        parts = [f"loaded by {first} and, {condition} by {', '.join(others)}"]
    else:
        parts = [f"loaded by {', '.join([first, *others])}"]
    refused = [loader.name for loader in found if loader.loads is False]
    if refused:
        parts.append(f"not by {', '.join(refused)} (report.json says why)")
    untried = [loader.name for loader in found if loader.loads is None]
    if untried:
        parts.append(f"not tried with {', '.join(untried)}")
    return "; ".join(parts)


def _common(held: Contents) -> list[str]:
    """What none of the servers takes."""
    reasons = []
    if held.whole:
        reasons.append(f"it takes no modules stored whole (modules_to_save): {_some(held.whole)}")
    if held.biases:
        reasons.append(f"it takes no biases: {_some(held.biases)}")
    if held.experts:
        reasons.append(f"stacked experts have not been seen to load: {_some(held.experts)}")
    if held.others:
        reasons.append(f"it takes linear layers only: {_some(held.others)}")
    return reasons


def _some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    more = len(names) - 1
    return names[0] if not more else f"{names[0]} and {more} more"


def _lonely(modules: Collection[str]) -> list[str]:
    """Layers of an adapter that lack one which SGLang wants with them."""
    found = []
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        needed = _NEEDS.get(leaf)
        if needed is not None and f"{parent}.{needed}" not in modules:
            found.append(module)
    return found
