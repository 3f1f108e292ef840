"""Prototype heads: a frozen linear classifier from three examples a class, no training.

A trained head would let the pretrained encoder do most of the work, and merging would have little
to lose. Class prototypes play the part that text embeddings play for CLIP: fixed class directions,
to which fine-tuning moves the encoder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HEAD_FILE = "head.safetensors"
LOGIT_SCALE = 5.0  # a prototype's own logit; 20 makes the first steps ruin the encoder


@dataclass(frozen=True)
class Head:
    """A linear classifier on the encoder's features: weight (classes, width), bias (classes,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of features (N, width)."""
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def digest(self) -> str:
        """A short hash of the head's values."""
        values = torch.cat([self.weight, self.bias[:, None]], dim=1)
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `head.safetensors` into an existing folder."""
        from safetensors.torch import save_file

        tensors = {
            "classifier.weight": self.weight.contiguous(),
            "classifier.bias": self.bias.contiguous(),
        }
        save_file(tensors, folder / HEAD_FILE)

    @staticmethod
    def load(folder: Path) -> Head:
        """Read `head.safetensors` of a folder."""
        from safetensors.torch import load_file

        tensors = load_file(folder / HEAD_FILE)
        return Head(tensors["classifier.weight"], tensors["classifier.bias"])


def first_of_each(labels: np.ndarray, classes: int, shots: int) -> np.ndarray:
    """Positions of the first `shots` examples of each class, class by class.

    Raises:
        ValueError: a class has fewer.
    """
    positions = []
    for label in range(classes):
        own = np.flatnonzero(labels == label)[:shots]
        if len(own) < shots:
            raise ValueError(
                f"class {label} has {len(own)} training examples; its prototype needs {shots}"
            )
        positions.append(own)
    return np.concatenate(positions)


def head_of(prototypes: torch.Tensor) -> Head:
    """The head of class prototypes (classes, width).

    With c the mean of the prototypes and p_k the unit vector from c to prototype k, the logit of a
    feature f is `s * p_k . (f - c)`, where s makes a prototype's own logit `LOGIT_SCALE` on
    average.
    """
    centre = prototypes.mean(dim=0)
    offsets = prototypes - centre
    lengths = offsets.norm(dim=1, keepdim=True)
    weight = offsets / lengths * (LOGIT_SCALE / lengths.mean())
    return Head(weight, -(weight @ centre))
