"""Accuracy of encoder folders on the demo's tasks: images decoded once, results in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common.cache import cache_root, read_manifest, settings_hash, write_json
from benchmarks.vision.finetune import FineTuning, load_head
from benchmarks.vision.splits import Split
from benchmarks.vision.tasks import load_split, task_folder


class Evaluator:
    """Accuracy of encoder folders on the demo's tasks, remembered in the cache.

    Args:
        heads: the tasks' heads.
        counts: images a task by split.
        fresh: evaluate again what the cache knows.
    """

    def __init__(
        self, heads: Mapping[str, Any], counts: Mapping[str, int], fresh: bool = False
    ) -> None:
        self.heads = heads
        self.counts = counts
        self.fresh = fresh

    @classmethod
    def of_tuned(
        cls,
        names: Sequence[str],
        seed: int,
        settings: FineTuning,
        counts: Mapping[str, int],
        fresh: bool = False,
    ) -> Evaluator:
        """With the heads that the fine-tuned encoders of these tasks were trained under."""
        return cls({name: load_head(name, seed, settings) for name in names}, counts, fresh)

    def __call__(
        self,
        folder: Path,
        split: str,
        names: Sequence[str] | None = None,
        told: Callable[[float], None] | None = None,
    ) -> dict[str, float]:
        """Accuracy (0 to 1) by task, of all tasks or the named ones.

        `told` gets the share of the work that each task was.
        """
        names = list(self.heads) if names is None else list(names)
        identity = {
            "model": [str(folder), _stamp(folder)],
            "heads": {name: self.heads[name].digest() for name in names},
            "data": {name: task_folder(name).name for name in names},
            "split": split,
            "images": self.counts[split],
        }
        path = cache_root() / "evaluations" / settings_hash(identity)
        known = None if self.fresh else read_manifest(path)
        if known is not None:
            return {name: known[name] for name in names}
        from benchmarks.vision.evaluate import accuracy, load_encoder

        model = load_encoder(folder)
        scores = {}
        for name in names:
            images = _images(task_folder(name), name, split, self.counts[split])
            scores[name] = accuracy(model, self.heads[name], images)
            if told is not None:
                told(1 / len(names))
        write_json(path / "manifest.json", scores)
        return scores


@cache
def _images(folder: Path, name: str, split: str, count: int) -> Split:
    """The first `count` images of a split, read once; `folder` tells caches apart."""
    del folder
    return load_split(name, split).head(count)


def _stamp(folder: Path) -> list[int]:
    """Changes when the folder's weights are written anew."""
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))]
