"""`report.html`: one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def html(_found: Mapping[str, Any]) -> str | None:
    """Nothing yet."""
    return None
