"""What the tensors of a PEFT adapter are, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.reading import ADAPTER_WEIGHTS

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
LORA = "LORA"
"""PEFT's name of the kind of adapter that is sorted here."""
PICKLED = "adapter_model.bin"
"""Weights as PEFT wrote them before safetensors; it reads both."""
BASE_RECORD = "base.json"
"""Beside adapters that `compress` has made: a digest of the base that they are around."""

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_WRAPPING = re.compile(r"\.(?:modules_to_save|base_layer)(?:\.default)?(?=\.|$)")
_PEFT_OTHERS = re.compile(r"\.lora_|\.token_adapter\.|\.trainable_tokens_")
# Beside trained biases PEFT 0.21.2 saves those of a module in modules_to_save three times: as what
# they are, as this (with the adapter's name, if it is a module of modules), and as the base's.
_AGAIN = re.compile(r"\.(?:modules_to_save|original_module)(?=\.)")
_AGAIN_NAMED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


@dataclass(frozen=True)
class Factors:
    """The two factors of a LoRA, and the bias of the second one.

    Attributes:
        module: name of the module as PEFT sees it, which for several parameters of one module
            ends in ``.base_layer``.
        a: the first factor's name in the file.
        b: the second one's.
        bias: that of the second one's bias, where there is one.
        is_embedding: of a table that is looked up: ``(r, tokens)`` and ``(width, r)``.
    """

    module: str
    a: str
    b: str
    bias: str | None
    is_embedding: bool


@dataclass
class Sorted:
    """The tensors of an adapter by what they are.

    Attributes:
        factors: those that make a LoRA.
        whole: names of tensors that take the place of the base's, such as those of
            ``modules_to_save``.
        others: names of what is neither: parts of other kinds of adapters, a factor without its
            other one.
    """

    factors: list[Factors] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def sort(names: Collection[str]) -> Sorted:
    """Sort the names of an adapter's tensors."""
    found = Sorted()
    biases: set[str] = set()
    for name in names:
        others = {_AGAIN.sub("", name), _AGAIN_NAMED.sub("", name)} - {name}
        if any(other in names for other in others):
            continue
        factor = _FACTOR.match(name)
        if factor is None:
            (found.others if _PEFT_OTHERS.search(name) else found.whole).append(name)
            continue
        start, end = factor.span(3)
        partner = f"{name[:start]}{'B' if factor[3] == 'A' else 'A'}{name[end:]}"
        if partner not in names:
            found.others.append(name)
        elif factor[3] == "A":
            bias = f"{factor[1]}.lora_B.bias"
            biases.add(bias)
            module = factor[1].removeprefix(PREFIX)
            held = bias if bias in names else None
            found.factors.append(Factors(module, name, partner, held, bool(factor[2])))
    found.others = [name for name in found.others if name not in biases]
    return found


def plain_name(name: str) -> str:
    """The name of a module or tensor in the base, without what PEFT wraps it in."""
    return _WRAPPING.sub("", name.removeprefix(PREFIX))


def is_of_parameter(module: str, config: Mapping[str, object]) -> bool:
    """Whether a module's LoRA is one of ``target_parameters``, such as stacked experts.

    It has the name of the module, whatever the parameter is called, and other shapes.
    """
    targets = config.get("target_parameters")
    named = targets if isinstance(targets, list) else []
    plain = plain_name(module)
    return any(f".{plain}".endswith(f".{str(name).rpartition('.')[0]}") for name in named)


def plain_config(config: Any) -> dict[str, Any]:
    """A config of PEFT's as JSON can hold it, in the order of the config's own."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


def weights_file(folder: Path) -> Path:
    """The file that PEFT reads."""
    if not (folder / ADAPTER_WEIGHTS).exists() and (folder / PICKLED).exists():
        return folder / PICKLED
    return folder / ADAPTER_WEIGHTS
