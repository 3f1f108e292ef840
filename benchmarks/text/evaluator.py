"""The text suite's evaluators for `mergekit-cart compare`.

    mergekit-cart compare RECIPE --evaluator benchmarks.text.evaluator:test --out DIR

A task's head is the same for all seeds, so that these judge every seed's encoders.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from benchmarks.text.encoder import all_features, load_encoder, load_tokenizer
from benchmarks.text.finetune import FineTuning, task_head
from benchmarks.text.tasks import SUITE, load_split

VALIDATION_TEXTS = 200
TEST_TEXTS = 500


def validation(model: str) -> dict[str, float]:
    """Accuracy by task on the validation split, for choosing settings."""
    return _accuracies(model, "validation", VALIDATION_TEXTS)


def test(model: str) -> dict[str, float]:
    """Accuracy by task on the test split."""
    return _accuracies(model, "test", TEST_TEXTS)


def _accuracies(model: str, split: str, most: int) -> dict[str, float]:
    encoder, tokenizer = load_encoder(Path(model)), load_tokenizer(Path(model))
    found = {}
    for name in SUITE:
        data = load_split(name, split).head(most)
        logits = task_head(name, FineTuning())(all_features(encoder, tokenizer, data.texts))
        share = (logits.argmax(dim=1) == torch.from_numpy(data.labels)).double().mean().item()
        found[name] = share
        found[f"{name}_stderr"] = math.sqrt(share * (1 - share) / len(data.labels))
    return found
