"""Broken models and recipes, drawn at random: each seed breaks one thing, or a few."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 10**9, 2**63, 10**30, 0.5, 1e308, -0.0),
    *("", "x", "x" * 5000, "NaN", "../../..", "/", "~", "é\u2028", "a+b", "a@b", "32", "float16"),
    *([], {}, [[]], [None], {"a": None}, [0, 1], [1.0, 0.0], {"filter": "x", "value": 1}),
    float("nan"),
    float("inf"),
]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a JSON document."""
    found = [path] if path else []
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        found += places(node[key], (*path, key))
    return found


def edit(document: Any, draw: random.Random) -> Any:
    """A document with one value changed, taken away, moved or renamed."""
    document = copy.deepcopy(document)
    paths = places(document)
    if not paths:
        return draw.choice(VALUES)
    *way, last = draw.choice(paths)
    node = document
    for step in way:
        node = node[step]
    kind = draw.randrange(6)
    if kind == 0:
        del node[last]
    elif kind == 1 and isinstance(node, dict):
        node[str(draw.choice(["", "x", f"{last}s", f"{last}."]))] = node.pop(last)
    elif kind == 2:
        other: Any = document
        for step in draw.choice(paths):
            other = other[step]
        node[last] = copy.deepcopy(other)
    elif kind == 3 and isinstance(node[last], str) and node[last]:
        text, at = node[last], draw.randrange(len(node[last]))
        node[last] = text[:at] + draw.choice(["", "x", ".", "/", " ", "1"]) + text[at + 1 :]
    elif kind == 4 and isinstance(node[last], int | float):
        node[last] = draw.choice([-node[last], node[last] * 2, node[last] + 1, str(node[last])])
    else:
        node[last] = copy.deepcopy(draw.choice(VALUES))
    return document


def scramble(data: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, changed, doubled or something else entirely."""
    kind = draw.randrange(7)
    at = draw.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
    if kind == 2:
        return b"\xef\xbb\xbf" + data
    if kind == 3:
        return draw.choice(
            [
                b"",
                b"null",
                b"[" * 100_000,
                b"<html>404</html>",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                draw.randbytes(500),
            ]
        )
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        if changed:
            changed[draw.randrange(min(len(changed), 3000))] = draw.randrange(256)
    return bytes(changed)


def weights(file: Path, draw: random.Random) -> None:
    """Break a safetensors file: its bytes, the length of its header, or what that says."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = draw.randrange(4)
    if kind == 0:
        file.write_bytes(scramble(data, draw))
    elif kind == 1:
        claimed = draw.choice([0, 1, length - 1, length + 1, 99_000_000, 2**60, 2**64 - 1])
        file.write_bytes(claimed.to_bytes(8, "little") + data[8:])
    else:
        header = json.loads(data[8 : 8 + length])
        for _ in range(draw.randrange(1, 3)):
            header = edit(header, draw)
        text = json.dumps(header).encode()
        body = data[8 + length :]
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
        if draw.randrange(4) == 0:  # a hole of ten gigabytes, which costs no disk
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size + 10**10)


def document(file: Path, draw: random.Random) -> None:
    """Break a JSON file."""
    if draw.randrange(4) == 0:
        file.write_bytes(scramble(file.read_bytes(), draw))
        return
    found = json.loads(file.read_text())
    for _ in range(draw.randrange(1, 4)):
        found = edit(found, draw)
    file.write_text(json.dumps(found))


def recipe(file: Path, draw: random.Random) -> None:
    """Break a recipe."""
    if draw.randrange(4) == 0:
        file.write_bytes(scramble(file.read_bytes(), draw))
        return
    found = yaml.safe_load(file.read_text())
    for _ in range(draw.randrange(1, 4)):
        found = edit(found, draw)
    file.write_text(yaml.safe_dump(found))


def gone(file: Path, draw: random.Random) -> None:
    """Take a file away, or put something else in its place."""
    file.unlink()
    kind = draw.randrange(4)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file)
    elif kind == 3:
        shutil.copyfile("/etc/hostname", file)


BREAKS: dict[str, Callable[[Path, random.Random], None]] = {
    "model.safetensors": weights,
    "model.safetensors.index.json": document,
    "config.json": document,
    "adapter_config.json": document,
    "adapter_model.safetensors": weights,
    "tokenizer.json": document,
    "tokenizer_config.json": document,
}
