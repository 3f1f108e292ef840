"""Where a weight is in a model, as its name says: stack of layers, layer, kind of module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

# A stage's own layers count, where a model has stages (ResNet, ConvNeXt, Swin).
_STAGES = re.compile(r"(?:^|\.)(?:stages|layers|levels)\.\d+\.(?:layers|blocks)\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")


class Place(NamedTuple):
    """Where a weight is.

    Attributes:
        stack: the stack of layers, such as encoder; None in models that have one.
        layer: its number there; None for what is in no layer.
        module: the kind of module, such as mlp.down_proj, after the stack's name.
    """

    stack: str | None
    layer: int | None
    module: str


def place(name: str) -> Place:
    """What a tensor's name says by itself, such as layer 3 and mlp.down_proj."""
    return _split(name)[1]


def places(names: Collection[str]) -> dict[str, Place]:
    """The same of all tensors of a model, by name.

    Stacks are told apart, such as encoder and decoder, towers of text and images, and stages, if
    weights of two would come to one place without.
    """
    split = {name: _split(name) for name in names}
    found = {name: own for name, (_, own) in split.items()}
    stacks: dict[Place, set[str]] = defaultdict(set)
    for prefix, own in split.values():
        if own.layer is not None:
            stacks[own].add(prefix)
    alike = {prefix for held in stacks.values() if len(held) > 1 for prefix in held}
    titles = _titles(alike)
    for name, (prefix, own) in split.items():
        if own.layer is not None and prefix in alike:
            stack = titles[prefix] or prefix
            module = ".".join(part for part in (stack, own.module) if part)
            found[name] = Place(stack, own.layer, module)
    return found


def layers(names: Collection[str]) -> dict[str, dict[int, set[str]]]:
    """By stack of layers, what its layers hold: by number the kinds of module."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for stack, own in map(_split, names):
        if own.layer is not None:
            found[stack][own.layer].add(own.module)
    return found


def _split(name: str) -> tuple[str, Place]:
    """What stands before the layer's number, and the place after it."""
    found = _STAGES.search(name) or _LAYER.search(name)
    own = name.removesuffix(".weight")
    if found is None:
        return "", Place(None, None, own)
    module = _NUMBER.sub("", own[found.end() :]) or "weight"
    return name[: found.start(1)].rstrip("."), Place(None, int(found[1]), module)


def _titles(prefixes: Collection[str]) -> dict[str, str]:
    """Names of stacks without the parts that all have."""
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    start = _common(list(parts.values()))
    end = _common([own[:start:-1] for own in parts.values()])
    found = {}
    for prefix, own in parts.items():
        first = max(start - own[start].isdigit(), 0) if start < len(own) else 0
        found[prefix] = ".".join(own[first : len(own) - end])
    return found


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many of their first entries all lists have in common."""
    count = 0
    for entries in zip(*lists, strict=False):
        if len(set(entries)) > 1:
            break
        count += 1
    return count
