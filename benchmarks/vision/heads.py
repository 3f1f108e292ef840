"""Prototype heads (`common.heads`) of images, and what they read.

A head reads what `transformers.Dinov2ForImageClassification` reads: the class token and the mean
of the patch tokens, 2 x 384 values. So encoder and head together are that model, and FusionBench's
DINOv2 pool loads them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.common.cache import new_folder, write_json
from benchmarks.common.heads import Head, first_of_each, head_of
from benchmarks.vision.backbone import IMAGE_MEAN, IMAGE_STD
from benchmarks.vision.splits import Split

if TYPE_CHECKING:
    from transformers import Dinov2Model


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 56, 56, 3) -> normalised fp32 (N, 3, 56, 56), as the saved image processor does."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (values - mean) / std


def features(model: Dinov2Model, images: torch.Tensor) -> torch.Tensor:
    """Class token beside mean patch token, (N, 2 * width), of normalised images (N, 3, h, w)."""
    tokens = model(images).last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


@torch.no_grad()
def all_features(model: Dinov2Model, images: np.ndarray, batch: int = 100) -> torch.Tensor:
    """Features (N, 2 * width) of uint8 images (N, h, w, 3), in batches."""
    parts = [
        features(model, pixels(images[start : start + batch]))
        for start in range(0, len(images), batch)
    ]
    return torch.cat(parts)


def prototype_head(model: Dinov2Model, train: Split, classes: int, shots: int) -> Head:
    """Class means of `shots` training images a class, centred and normalised, as a linear head.

    See `head_of` for the formula.

    Raises:
        ValueError: a class has fewer than `shots` images.
    """
    found = all_features(model, train.images[first_of_each(train.labels, classes, shots)])
    return head_of(found.view(classes, shots, -1).mean(dim=1))


def assemble_classifier(encoder: Path, head: Head, folder: Path) -> None:
    """Write a `Dinov2ForImageClassification` folder from an encoder folder and a head.

    The weights of the encoder are linked, not copied, where the file system can; the head is a
    second shard. Both `AutoModelForImageClassification` and FusionBench's
    `Dinov2ForImageClassificationPool` load the folder.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    parts = {
        "classifier.weight": head.weight.contiguous(),
        "classifier.bias": head.bias.contiguous(),
    }
    with new_folder(folder) as target:
        config = Dinov2Config.from_pretrained(encoder)
        config.architectures = ["Dinov2ForImageClassification"]
        config.id2label = {number: str(number) for number in range(len(head.bias))}
        config.label2id = {label: number for number, label in config.id2label.items()}
        config.save_pretrained(target)
        shutil.copy2(encoder / "preprocessor_config.json", target)
        shard, own = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        link(encoder / "model.safetensors", target / shard)
        save_file(parts, target / own, metadata={"format": "pt"})
        with safe_open(target / shard, "pt") as handle:
            names = list(handle.keys())
        weight_map = dict.fromkeys(names, shard) | dict.fromkeys(parts, own)
        size = (target / shard).stat().st_size + (target / own).stat().st_size
        write_json(
            target / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )


def link(source: str | Path, target: str | Path) -> None:
    """Another name for a file that is not going to change, or a copy where that is not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
