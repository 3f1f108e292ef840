"""Splits of images: what they hold, and their check for leaks (groups: `common.splits`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from benchmarks.common.splits import Labelled, check_disjoint


@dataclass(frozen=True)
class Split(Labelled):
    """Images of one task and one split.

    Args:
        images: uint8, (N, 56, 56, 3), RGB.
        labels: int64, (N,), class numbers.
        groups: int64, (N,), numbers of the groups that must not be in two splits.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    suffix: ClassVar[str] = ".npz"

    def take(self, index: np.ndarray) -> Split:
        """The images at these positions."""
        return Split(self.images[index], self.labels[index], self.groups[index])

    def without_copies(self) -> Split:
        """The first of images that are equal to the last bit, in their order."""
        _, first = np.unique(self.images.reshape(len(self), -1), axis=0, return_index=True)
        return self.take(np.sort(first))

    def save(self, path: Path) -> None:
        """Write the arrays."""
        np.savez_compressed(path, images=self.images, labels=self.labels, groups=self.groups)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["images"], arrays["labels"], arrays["groups"])


def image_keys(images: np.ndarray) -> list[bytes]:
    """A key for each image that is equal exactly for equal images."""
    return [image.tobytes() for image in images]


def check_no_leak(splits: dict[str, Split]) -> None:
    """Fail if a group or an identical image is in two splits.

    Raises:
        ValueError: it names the two splits.
    """
    check_disjoint({name: data.groups.tolist() for name, data in splits.items()}, "groups")
    keys = {name: image_keys(data.images) for name, data in splits.items()}
    check_disjoint(keys, "identical images")
