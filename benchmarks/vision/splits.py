"""Train, validation and test without leaks: what looks alike stays together.

A *group* is whatever must not be torn apart. Splits are drawn over groups, never over images, and
do not depend on the fine-tuning seed: what was test for one seed must not be tuned on with another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20241216  # one for the whole suite, see above


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


def assign_groups(
    sizes: Sequence[int] | np.ndarray,
    *,
    test: float,
    validation: float,
    rng: np.random.Generator,
    least: int = 2,
) -> np.ndarray:
    """Give every group to a split: 0 train, 1 validation, 2 test.

    Groups come in random order; the test split takes groups until it has its share of the members
    and at least `least` groups, then validation, then train gets the rest. A group with more than a
    quarter of all members goes to train, so that one large family does not become the whole test.

    Args:
        sizes: members (faces, images) of each group.
        test: share of the members for the test split.
        validation: share for the validation split.
        rng: source of the order.
        least: groups that test and validation must have at least.

    Returns:
        int64, (len(sizes),).

    Raises:
        ValueError: there are too few groups to leave one for training.
    """
    sizes = np.asarray(sizes)
    total = sizes.sum()
    small = [int(group) for group in rng.permutation(len(sizes)) if sizes[group] <= total / 4]
    if len(sizes) < 2 * least + 1 or len(small) < 2 * least:
        raise ValueError(
            f"{len(sizes)} groups of sizes {sizes.tolist()} are too few for three splits"
        )
    result = np.zeros(len(sizes), dtype=np.int64)
    for split, share in ((2, test), (1, validation)):
        later = least if split == 2 else 0  # groups that validation still needs
        members = chosen = 0
        while (members < share * total or chosen < least) and len(small) > later:
            group = small.pop(0)
            result[group] = split
            members += sizes[group]
            chosen += 1
    if not (result == 0).any():
        raise ValueError("no group is left for training")
    return result


def merge_groups(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Number the connected components of `count` items under `pairs`: int64, (count,)."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in pairs:
        parent[root(first)] = root(second)
    roots = [root(item) for item in range(count)]
    numbers = {value: number for number, value in enumerate(dict.fromkeys(roots))}
    return np.array([numbers[value] for value in roots], dtype=np.int64)


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which the classes take turns, so that every prefix is nearly balanced."""
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        turn[rng.permutation(positions)] = np.arange(len(positions))
    return np.lexsort((rng.random(len(labels)), turn))


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


def check_disjoint(splits: Mapping[str, Iterable[Hashable]], what: str) -> None:
    """Fail if two splits share any of their keys.

    Raises:
        ValueError: it names the two splits, and what they share.
    """
    sets = {name: set(keys) for name, keys in splits.items()}
    for first, second in combinations(sets, 2):
        shared = sets[first] & sets[second]
        if shared:
            raise ValueError(f"{len(shared)} {what} are in both {first} and {second}")
