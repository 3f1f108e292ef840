"""Models by their names on the hub: ``ORG/NAME``, or ``ORG/NAME@REVISION`` as recipes have it."""

from __future__ import annotations

from pathlib import Path


def cached(name: str) -> Path | None:
    """The folder in the hub's cache; None if it is not there, or the name is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def download(name: str) -> str:
    """The command that downloads it into the cache."""
    repository, _, revision = name.partition("@")
    return f"hf download {repository}" + (f" --revision {revision}" if revision else "")
