"""Checkpoints that are broken on purpose, and the message that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cart_plugin import CartError
from cart_plugin.compress import compress


def refusal(models: Sequence[Path], tmp_path: Path, **options: Any) -> str:
    """The message with which compression is refused; nothing is left behind."""
    out = tmp_path / "out"
    with pytest.raises(CartError) as caught:
        compress(models, out, **options)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(folder: Path, name: str, make) -> None:
    """Replace a tensor of a checkpoint."""
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name] = make(held[name])
            save_file(held, file, metadata={"format": "pt"})


def configure(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
