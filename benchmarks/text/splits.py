"""Texts into train, validation and test without leaks: what reads alike stays together.

Groups and the random order are those of `benchmarks.common.splits`; here is what is special about
texts: copies are found by their words, near-copies by the runs of words that they share.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from benchmarks.common.splits import SPLITS, Labelled, assign_groups, check_disjoint, merge_groups

READ_WORDS = 100  # near-copies are judged by their beginning, as an encoder of 128 tokens reads it
RUN = 3  # words in a row that are compared
BANDS, ROWS = 16, 4  # of MinHash: half of the runs in common are found with probability 0.64

_WORD = re.compile(r"[^\W_]+")


class Example(NamedTuple):
    """A text, its class, and what must not be torn apart: its speech, thread, headword ..."""

    text: str
    label: int
    unit: Hashable


@dataclass(frozen=True)
class Split(Labelled):
    """Texts of one task and one split.

    Args:
        texts: N strings.
        labels: int64, (N,), class numbers.
        groups: int64, (N,), numbers of the groups that must not be in two splits.
    """

    texts: list[str]
    labels: np.ndarray
    groups: np.ndarray
    suffix: ClassVar[str] = ".json"

    def take(self, index: np.ndarray) -> Split:
        """The texts at these positions."""
        texts = [self.texts[position] for position in index]
        return Split(texts, self.labels[index], self.groups[index])

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        arrays = {"labels": self.labels.tolist(), "groups": self.groups.tolist()}
        path.write_text(json.dumps({"texts": self.texts} | arrays))

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        labels, groups = (np.array(content[name], np.int64) for name in ("labels", "groups"))
        return cls(content["texts"], labels, groups)


def split_examples(
    examples: Iterable[Example],
    rng: np.random.Generator,
    *,
    test: float = 0.2,
    validation: float = 0.1,
) -> dict[str, Split]:
    """Three splits of whole groups, drawn class by class, so that each has its share of each class.

    A group holds the examples of one unit and those that read nearly the same. Of copies the first
    stays; a text with two labels goes. A group with examples of several classes is drawn with those
    of its first one.

    Args:
        examples: of all classes.
        rng: source of the order.
        test: share of each class for the test split.
        validation: share for the validation split.

    Raises:
        ValueError: a class has too few groups for three splits.
    """
    kept = _unambiguous(examples)
    texts = [" ".join(example.text.split()) for example in kept]
    labels = np.array([example.label for example in kept], dtype=np.int64)
    first_of: dict[Hashable, int] = {}
    pairs = [(at, first_of.setdefault(example.unit, at)) for at, example in enumerate(kept)]
    groups = merge_groups(len(kept), pairs + near_copies(texts))
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    split_of = np.zeros(len(sizes), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels[first] == label)
        split_of[own] = assign_groups(sizes[own], test=test, validation=validation, rng=rng)
    everything = Split(texts, labels, groups)
    return {
        name: everything.take(np.flatnonzero(split_of[groups] == number))
        for number, name in enumerate(SPLITS)
    }


def at_most(examples: Iterable[Example], most: int, rng: np.random.Generator) -> list[Example]:
    """At most `most` examples of each class, drawn at random, in the order in which they came."""
    everything = list(examples)
    labels = np.array([example.label for example in everything])
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:most] for label in np.unique(labels)
    ]
    return [everything[position] for position in np.sort(np.concatenate(chosen))]


def text_key(text: str) -> str:
    """A text's letters and digits without case, as words: equal for what counts as a copy."""
    return " ".join(_WORD.findall(text.casefold()))


def _unambiguous(examples: Iterable[Example]) -> list[Example]:
    """The first example of each text that has one label only."""
    by_key: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_key[text_key(example.text)].append(example)
    return [
        same[0]
        for key, same in by_key.items()
        if key and len({example.label for example in same}) == 1
    ]


def near_copies(texts: list[str]) -> list[tuple[int, int]]:
    """Pairs of positions whose texts share about half of their runs of words, by MinHash."""
    draw = np.random.default_rng(0)  # what is alike must not depend on the task or its seed
    factors = draw.integers(1, 2**64, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    seen: dict[tuple[int, bytes], int] = {}
    pairs = []
    for position, text in enumerate(texts):
        words = text.casefold().split()[:READ_WORDS]
        starts = range(max(1, len(words) - RUN + 1))
        runs = {zlib.crc32(" ".join(words[start : start + RUN]).encode()) for start in starts}
        # The upper half of a product with an odd factor is a hash; overflow is meant.
        hashes = np.array(sorted(runs), dtype=np.uint64)[:, None] * factors >> np.uint64(32)
        for band, row in enumerate(hashes.min(axis=0).reshape(BANDS, ROWS)):
            other = seen.setdefault((band, row.tobytes()), position)
            if other != position:
                pairs.append((position, other))
    return pairs


def check_no_leak(splits: dict[str, Split]) -> None:
    """Fail if a group or a text is in two splits.

    Raises:
        ValueError: it names the two splits.
    """
    check_disjoint({name: data.groups.tolist() for name, data in splits.items()}, "groups")
    keys = {name: map(text_key, data.texts) for name, data in splits.items()}
    check_disjoint(keys, "equal texts")
