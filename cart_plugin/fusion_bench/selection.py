"""Which parameters FusionBench's CART methods decompose: the authors' presets, or patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from cart_plugin.errors import CartError
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

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


def selection(
    decompose: str | Iterable[str],
    names: Sequence[str],
    exclude: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
) -> Decision:
    """The rule that a method's parameters ``decompose`` and ``exclude_keys`` stand for.

    Args:
        decompose: name of a preset, or patterns as of the shell (``*.mlp.*``, ``*.weight``);
            what matches one of them is decomposed if it is a matrix, a stack of matrices or a
            convolution kernel.
        names: all tensors' names, to check that the patterns mean some of them.
        exclude: names or patterns of what is not decomposed all the same.
        tied: further names of tied tensors, with the name that stands for them: patterns may mean
            either.

    Raises:
        CartError: no such preset, or a pattern that matches nothing.
    """
    _check(exclude, names, "exclude_keys: {!r} matches")
    further: dict[str, list[str]] = {}
    for name, other in (tied or {}).items():
        further.setdefault(other, []).append(name)

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(_matches(one, patterns) for one in (name, *further.get(name, ())))

    if isinstance(decompose, str) and decompose in PRESETS:
        chosen = PRESETS[decompose]
    else:
        presets = ", ".join(PRESETS)
        if not isinstance(decompose, Iterable):
            raise CartError(f"decompose is a preset ({presets}) or patterns, got {decompose!r}")
        single = isinstance(decompose, str)
        patterns = [str(decompose)] if single else [str(entry) for entry in decompose]
        _check(patterns, names, f"decompose: {{!r}} is no preset ({presets}) and matches")

        def chosen(name: str, shape: torch.Size) -> bool:
            # By its matrices' shape alone: the patterns have the say, not what tables are called.
            if not matches(name, patterns) or len(shape) < 2:
                return False
            return is_decomposed(None, matrix_shape(name, shape))

    return lambda name, shape: chosen(name, shape) and not matches(name, exclude)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(patterns: Iterable[str], names: Sequence[str], found: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CartError(
                f"{found.format(pattern)} none of the {len(names)} parameters, such as "
                f"{', '.join(list(names)[:3])}"
            )
