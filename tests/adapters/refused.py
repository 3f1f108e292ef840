"""A merge that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cart_plugin import CartError
from cart_plugin.adapters import merge_adapters


def refuses(adapters: list[Path], *parts: str, out: Path | None = None, **options: Any) -> None:
    """In one line that has these parts; nothing is left behind."""
    out = out or adapters[-1].parent / "out"
    before = sorted(out.parent.iterdir())
    with pytest.raises(CartError) as caught:
        merge_adapters(adapters, out, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    assert sorted(out.parent.iterdir()) == before
