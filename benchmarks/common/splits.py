"""Train, validation and test without leaks: what looks or reads alike stays together.

A *group* is whatever must not be torn apart. Splits are drawn over groups, never over examples, and
do not depend on the fine-tuning seed: what was test for one seed must not be tuned on with another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20241216  # one for all suites, see above

S = TypeVar("S", bound="Labelled")


class Labelled(ABC):
    """What splits of images and of texts have in common.

    Attributes:
        labels: int64, (N,), class numbers.
        groups: int64, (N,), numbers of the groups that must not be in two splits.
        suffix: of the file of a split.
    """

    labels: np.ndarray
    groups: np.ndarray
    suffix: ClassVar[str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def take(self: S, index: np.ndarray) -> S:
        """The examples at these positions."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the split."""

    @classmethod
    @abstractmethod
    def load(cls: type[S], path: Path) -> S:
        """Read what `save` wrote."""

    def head(self: S, count: int | None) -> S:
        """The first `count` (all if None): a fair sample, as splits are stored shuffled."""
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
