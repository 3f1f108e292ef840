"""Splits of images: what they hold, and their check for leaks (groups: `common.splits`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.common.splits import check_disjoint


@dataclass(frozen=True)
class Split:
    """Images of one task and one split.

    Args:
        images: uint8, (N, 56, 56, 3), RGB.
        labels: int64, (N,), class numbers.
        groups: int64, (N,), numbers of the groups that must not be in two splits.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        """The images at these positions."""
        return Split(self.images[index], self.labels[index], self.groups[index])

    def head(self, count: int | None) -> Split:
        """The first `count` images (all if None): a fair sample, as splits are stored shuffled."""
        return self if count is None else self.take(np.arange(min(count, len(self))))


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
