"""Accuracy of one encoder folder on a list of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common.heads import Head
from benchmarks.vision.heads import all_features
from benchmarks.vision.splits import Split
from benchmarks.vision.tasks import load_split

if TYPE_CHECKING:
    from transformers import Dinov2Model


def accuracy(model: Dinov2Model, head: Head, data: Split) -> float:
    """Share of the images that encoder and head classify rightly, between 0 and 1."""
    predicted = head(all_features(model, data.images)).argmax(dim=1)
    return (predicted == torch.from_numpy(data.labels)).double().mean().item()


def evaluate_encoder(
    folder: Path, heads: Mapping[str, Head], split: str, limit: int | None = None
) -> dict[str, float]:
    """Accuracy of an encoder on several tasks.

    Args:
        folder: a transformers folder that holds a `Dinov2Model`.
        heads: the tasks' heads by task name.
        split: `validation` or `test` (or `train`).
        limit: use only the first so many images of each task.

    Returns:
        Accuracy (0 to 1) by task name, in the order of `heads`.

    Raises:
        ValueError: the folder lacks weights of the encoder (a merge that lost tensors).
    """
    model = load_encoder(folder)
    return {
        name: accuracy(model, head, load_split(name, split).head(limit))
        for name, head in heads.items()
    }


def load_encoder(folder: Path) -> Dinov2Model:
    """Load an encoder in eval mode; refuse a folder from which weights are missing."""
    from transformers import Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of the encoder, for example {missing[0]}"
        )
    return model.eval()
