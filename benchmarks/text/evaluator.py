"""The text suite's evaluators for `mergekit-cart compare`.

    mergekit-cart compare RECIPE --evaluator benchmarks.text.evaluator:test --out DIR

A task's head is the same for all seeds, so that these judge every seed's encoders.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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
    for name, share in shares(encoder, tokenizer, split, most).items():
        count = len(load_split(name, split).head(most).labels)
        found[name] = share
        found[f"{name}_stderr"] = math.sqrt(share * (1 - share) / count)
    return found


def shares(encoder: Any, tokenizer: Any, split: str, most: int) -> dict[str, float]:
    """Accuracy by task of an encoder on so many texts of a split."""
    found = {}
    for name in SUITE:
        data = load_split(name, split).head(most)
        logits = task_head(name, FineTuning())(all_features(encoder, tokenizer, data.texts))
        right = logits.argmax(dim=1) == torch.from_numpy(data.labels)
        found[name] = right.double().mean().item()
    return found
