"""Where the suite keeps what it made, and how a folder gets there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints import files

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """The cache folder, absolute: `CART_CACHE`, or `~/.cache/cart-plugin`."""
    chosen = os.environ.get("CART_CACHE")
    root = Path(chosen) if chosen else Path.home() / ".cache" / "cart-plugin"
    return root.expanduser().resolve()


def settings_hash(settings: Any) -> str:
    """Twelve hex digits that change whenever any of the (JSON-able) settings does."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if the folder is not there or not finished."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end, or vanishes if the block raises.

    The temporary folder lies beside `folder`, so the last step is one rename. An older `folder` is
    replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are private; the result is an ordinary folder
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
