"""Which token has which id, from the files of several kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cart_plugin.checkpoints.tokenizers import are_same_files, read_vocabulary


def fast(vocabulary: object) -> dict[str, Any]:
    return {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2, "content": "<x>"}]}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": fast({"a": 0, "b": 1})},
        {"tokenizer.json": fast([["a", -1.0], ["b", -2.0]])},
        {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 2}},
        {
            "vocab.txt": "a\nb\n",
            "tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<x>"}}},
        },
    ],
    ids=["fast", "unigram", "json", "txt"],
)
def test_tokens_by_id(files: dict[str, object], tmp_path: Path) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert found.tokens == {0: "a", 1: "b", 2: "<x>"}
    assert found.is_whole


def test_tokens_that_some_take_for_line_breaks(tmp_path: Path) -> None:
    tokens = ["a", "\x85", "\u2028", "\x0b", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert found.tokens == dict(enumerate(tokens))


def test_an_empty_vocabulary_is_none(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("")
    assert read_vocabulary(tmp_path) is None


def test_added_tokens_alone_are_no_whole_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "added_tokens.json").write_text('{"<x>": 9}')
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert not found.is_whole
    assert found.tokens == {9: "<x>"}


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "{}", '{"model": 3}', '{"model": {"vocab": 3}}', '{"model": []}']
)
def test_what_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert read_vocabulary(tmp_path) is None


def test_same_files(tmp_path: Path) -> None:
    for name, text in (("one", "{}"), ("two", "{}"), ("three", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    assert are_same_files(tmp_path / "one", tmp_path / "two")
    assert not are_same_files(tmp_path / "one", tmp_path / "three")
