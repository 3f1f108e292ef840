"""Numbers of tokens that a model's configs name: they mean nothing but by its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cart_plugin.checkpoints.configs import parts

_KEY = re.compile(r"_token_(?:id|index)s?$|^(?:begin_)?suppress_tokens$")
_OF_CODES = re.compile(r"^t2u_|code(?:c|book)_")  # of speech, which no tokenizer numbers
# What a model can do without, or its tokenizer names; others stand for an image, or the like.
_ROLE = re.compile(r"^(?:forced_|decoder_)?(bos|eos|pad|sep|cls|mask|unk|start)_token_id$")


@dataclass(frozen=True)
class Entry:
    """A key of a config that names tokens.

    Attributes:
        section: the config, or the part of it, that has the key.
        key: its name there.
        path: with the part's name: `text_config.eos_token_id`.
    """

    section: dict[str, Any]
    key: str
    path: str

    @property
    def is_list(self) -> bool:
        """Whether it may name several."""
        return isinstance(self.section[self.key], list)

    @property
    def numbers(self) -> list[int]:
        """Those of its tokens; one below zero stands for none."""
        value = self.section[self.key]
        return list(value) if self.is_list else [value]

    @property
    def role(self) -> str:
        """What its token is to a tokenizer, such as `eos`; empty if nothing."""
        found = _ROLE.match(self.key)
        return found[1] if found else ""

    @property
    def may_go(self) -> bool:
        """Whether the model is one without it."""
        return bool(self.role) or self.key.endswith("suppress_tokens")


def entries(config: dict[str, Any]) -> Iterator[Entry]:
    """All keys of a config and its parts that name tokens, by one number or a list of them."""
    for path, section in parts(config):
        for key, value in section.items():
            numbers = value if isinstance(value, list) else [value]
            is_named = _KEY.search(key) and not _OF_CODES.search(key)
            if is_named and all(isinstance(number, int) for number in numbers):
                yield Entry(section, key, f"{path}.{key}".lstrip("."))


def renumber(
    config: dict[str, Any],
    old: Mapping[int, str],
    new: Mapping[str, int],
    special: Mapping[str, int],
) -> None:
    """Number a config's tokens as another tokenizer does.

    A token that this one lacks is replaced by its own for the same role, or else by none. What
    stands for an image, or the like, keeps its number then: the model cannot be without.

    Args:
        config: changed in place.
        old: the tokens by the numbers that it has.
        new: the new numbers.
        special: those of the new tokenizer's own tokens, by their roles.
    """
    for entry in entries(config):
        found = [_renumbered(number, entry, old, new) for number in entry.numbers]
        kept = [number for number in found if number is not None]
        if found and not kept and entry.role in special:
            kept = [special[entry.role]]
        if found and not kept:
            entry.section[entry.key] = None
        else:
            entry.section[entry.key] = kept if entry.is_list else kept[0]


def _renumbered(
    number: int, entry: Entry, old: Mapping[int, str], new: Mapping[str, int]
) -> int | None:
    if number < 0:
        return number
    token = old.get(number)
    if token is None or token not in new:
        return None if entry.may_go else number
    return new[token]
