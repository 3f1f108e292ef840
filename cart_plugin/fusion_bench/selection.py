"""Which parameters FusionBench's CART methods decompose: the authors' presets, or patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from cart_plugin.errors import CartError
from cart_plugin.merging import is_decomposed

Decision = Callable[[str, torch.Size], bool]


def _clip(name: str, shape: torch.Size) -> bool:
    named = ("attn" in name or "mlp" in name) and "ln" not in name and "bias" not in name
    return named and len(shape) == 2


def _roberta(name: str, shape: torch.Size) -> bool:
    return len(shape) == 2 and "embeddings" not in name and "classifier" not in name


def _gpt2(name: str, shape: torch.Size) -> bool:
    left_out = ("wte", "wpe", "lm_head", "score", "classifier")
    return len(shape) == 2 and not set(left_out) & set(name.split("."))


PRESETS: dict[str, Decision] = {
    "auto": is_decomposed,
    # The authors' choices (github.com/JH-GEECS/CART): in their CLIP, keys with `attn` or `mlp`
    # and without `ln` or `bias`; in RoBERTa and GPT-2 all matrices but embeddings and classifier.
    "clip": _clip,
    "roberta": _roberta,
    "gpt2": _gpt2,
}


def selection(decompose: str | Iterable[str], names: Sequence[str]) -> Decision:
    """The rule that a method's parameter ``decompose`` stands for.

    Args:
        decompose: name of a preset, or patterns as of the shell (``*.mlp.*``, ``*.weight``);
            what matches one of them is decomposed if it is a matrix, a stack of matrices or a
            convolution kernel.
        names: all tensors' names, to check that the patterns mean some of them.

    Raises:
        CartError: no such preset, or a pattern that matches nothing.
    """
    if isinstance(decompose, str) and decompose in PRESETS:
        return PRESETS[decompose]
    patterns = [decompose] if isinstance(decompose, str) else [str(entry) for entry in decompose]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CartError(
                f"decompose: {pattern!r} is no preset ({', '.join(PRESETS)}) and matches none of "
                f"the {len(names)} parameters, such as {', '.join(list(names)[:3])}"
            )

    def matches(name: str, shape: torch.Size) -> bool:
        # Without its name a tensor is judged by its shape alone: the patterns have the say.
        return any(fnmatchcase(name, pattern) for pattern in patterns) and is_decomposed(
            None, shape
        )

    return matches
