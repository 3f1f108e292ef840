"""The demo's checkpoints, where it has left them: a ViT-S/14 and its fine-tuned copies."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.cache import cache_root, read_manifest

if TYPE_CHECKING:
    from benchmarks.vision.finetune import FineTuning

TASKS = ("mnist", "georgian", "hangul", "hiragana")
MISSING = "the demo's checkpoints are not in the cache: run `make demo` first"


def fine_tuning() -> FineTuning:
    """How the demo fine-tunes."""
    from benchmarks.vision.finetune import FineTuning

    return FineTuning()


def find_demo_models() -> list[Path] | None:
    """Folders of the pretrained encoder and the fine-tuned ones, or None unless all are there."""
    wanted = asdict(fine_tuning())
    found: dict[str, tuple[float, Path, str]] = {}
    encoders = cache_root() / "encoders"
    for folder in encoders.glob("seed0/*"):
        manifest = read_manifest(folder)
        if manifest is None or any(manifest.get(name) != value for name, value in wanted.items()):
            continue
        newest = (folder / "manifest.json").stat().st_mtime, folder, manifest["pretrained"]
        found[manifest["task"]] = max(newest, found.get(manifest["task"], newest))
    if not set(TASKS) <= set(found):
        return None
    base = encoders / found[TASKS[0]][2]
    return None if read_manifest(base) is None else [base, *(found[name][1] for name in TASKS)]
