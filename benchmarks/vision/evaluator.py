"""The vision suite's evaluators for `mergekit-cart compare`, on the heads of seed 0.

    mergekit-cart compare RECIPE --evaluator benchmarks.vision.evaluator:test --out DIR

The recipe merges encoders of the suite, which `make bench-vision` leaves in the cache.
"""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.vision.evaluate import evaluate_encoder
from benchmarks.vision.finetune import load_head
from benchmarks.vision.strength import strength
from benchmarks.vision.tasks import SUITE, load_split

IMAGES = 500


def validation(model: str) -> dict[str, float]:
    """Accuracy by task on the validation split, for choosing settings."""
    return _accuracies(model, "validation")


def test(model: str) -> dict[str, float]:
    """Accuracy by task on the test split."""
    return _accuracies(model, "test")


def _accuracies(model: str, split: str) -> dict[str, float]:
    heads = {name: load_head(name, 0, strength(name)) for name in SUITE}
    found = {}
    for name, share in evaluate_encoder(Path(model), heads, split, IMAGES).items():
        count = min(IMAGES, len(load_split(name, split)))
        found[name] = share
        found[f"{name}_stderr"] = math.sqrt(share * (1 - share) / count)
    return found
