"""Which token has which row of the embedding, as a model's tokenizer files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.files import read_json

_CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer.json", _CONFIG, "added_tokens.json", "vocab.json", "vocab.txt")
# Tokenizers whose tokens are not read here: sentencepiece's and others'.
_ALONE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has files that transformers makes a tokenizer of."""
    return any((folder / name).is_file() for name in (*_FILES, *_ALONE))


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        tokens: by id.
        is_whole: all of them are known, and not only those that were added.
    """

    tokens: Mapping[int, str]
    is_whole: bool


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokens of a model's folder; None if it has no tokenizer whose files can be read."""
    tokens: dict[int, str] = {}
    is_whole = False
    for name in _FILES:  # the first is the one that transformers reads, if it is there
        if not (folder / name).is_file():
            continue
        try:
            found = dict(_TOKENS[name](folder / name))
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None
        tokens = {**found, **tokens}
        is_whole = is_whole or name in ("tokenizer.json", "vocab.json", "vocab.txt")
    return Vocabulary(tokens, is_whole) if tokens else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens that a tokenizer names for a purpose, by it: `eos`, `pad`."""
    try:
        settings = read_json(folder / _CONFIG)
    except (OSError, ValueError):
        return {}
    found = {
        key.removesuffix("_token"): value.get("content") if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token")
    }
    return {role: token for role, token in found.items() if isinstance(token, str)}


def are_same_files(one: Path, other: Path) -> bool:
    """Whether two folders have the same tokenizer, byte by byte."""
    return all(_bytes(one / name) == _bytes(other / name) for name in _FILES)


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _fast(file: Path) -> Iterator[tuple[int, str]]:
    data = read_json(file)
    vocabulary = data["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        yield from _by_token(vocabulary)
    else:  # unigram: tokens with their scores
        yield from ((number, str(entry[0])) for number, entry in enumerate(vocabulary))
    yield from ((int(entry["id"]), entry["content"]) for entry in data.get("added_tokens") or ())


def _config(file: Path) -> Iterator[tuple[int, str]]:
    added = read_json(file).get("added_tokens_decoder") or {}
    yield from ((int(number), entry["content"]) for number, entry in added.items())


def _by_token(ids: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    yield from ((int(number), token) for token, number in ids.items())


def _lines(file: Path) -> list[str]:
    """A token a line; `splitlines` would split at tokens such as U+0085 and U+2028, too."""
    with file.open(encoding="utf-8") as opened:
        return [line.removesuffix("\n") for line in opened]


_TOKENS = {
    "tokenizer.json": _fast,
    _CONFIG: _config,
    "added_tokens.json": lambda file: _by_token(read_json(file)),
    "vocab.json": lambda file: _by_token(read_json(file)),
    "vocab.txt": lambda file: enumerate(_lines(file)),
}
