"""A table of tasks, and their data in the cache; each suite has one, with its own kind of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.sources import Source, fetch
from benchmarks.common.splits import SPLIT_SEED, SPLITS, Labelled, balanced_order

S = TypeVar("S", bound=Labelled)


@dataclass(frozen=True)
class Task(Generic[S]):
    """One classification task.

    Args:
        title: its name in tables.
        classes: number of classes.
        sources: what must be fetched.
        build: makes the three splits from the unpacked sources (by name) and a random generator.
        unit: what is never torn between splits.
    """

    title: str
    classes: int
    sources: tuple[Source, ...]
    build: Callable[[dict[str, Path], np.random.Generator], dict[str, S]]
    unit: str


def _keep_all(data: S) -> S:
    return data


@dataclass(frozen=True, kw_only=True)
class TaskTable(Generic[S]):
    """Tasks by name, and how their data get into the cache and out of it.

    Args:
        tasks: by name.
        place: folder of the cache that they share.
        examples: what one split is full of, as manifests call it.
        most: examples that are kept of each split.
        data_format: raised when a builder changes, so that cached data are made anew.
        kind: of the splits.
        check_no_leak: raises ValueError if splits share what they must not.
        hint: how to prepare a task; `{name}` stands for its name.
        drop_copies: leaves the first of equal examples of a split; by default nothing is dropped.
    """

    tasks: Mapping[str, Task[S]]
    place: str
    examples: str
    most: Mapping[str, int]
    data_format: int
    kind: type[S]
    check_no_leak: Callable[[dict[str, S]], None]
    hint: str
    drop_copies: Callable[[S], S] = _keep_all  # no lambda: bound methods can go to processes

    def task(self, name: str) -> Task[S]:
        """The task of this name.

        Raises:
            ValueError: there is none; the message lists those that there are.
        """
        try:
            return self.tasks[name]
        except KeyError:
            known = ", ".join(self.tasks)
            raise ValueError(f"unknown task {name!r}; the tasks are {known}") from None

    def folder(self, name: str) -> Path:
        """Where the task's data are kept once they are prepared."""
        return cache_root() / self.place / f"{name}-{settings_hash(self._settings(name))}"

    def _settings(self, name: str) -> dict[str, Any]:
        packages = self.task(name).sources
        return {
            "sources": [f"{source.kind}:{source.name}:{source.version}" for source in packages],
            "seed": SPLIT_SEED,
            "most": self.most,
            "format": self.data_format,
        }

    def prepare(self, name: str) -> Path:
        """Fetch and build the task's data unless they are there; return their folder.

        Raises:
            SourceError: a download failed.
            ValueError: unknown task, or its source does not give three splits without leaks.
        """
        folder = self.folder(name)
        if read_manifest(folder) is not None:
            return folder
        entry = self.task(name)
        folders = fetch(entry.sources)
        rng = np.random.default_rng([SPLIT_SEED, *name.encode()])
        splits = {
            split: _shorten(self.drop_copies(data), self.most[split], rng)
            for split, data in entry.build(folders, rng).items()
        }
        self.check_no_leak(splits)
        with new_folder(folder) as target:
            for split, data in splits.items():
                data.save(target / f"{split}{self.kind.suffix}")
            counts = {
                split: {self.examples: len(data), "groups": len(np.unique(data.groups))}
                for split, data in splits.items()
            }
            packages = {source.name: read_manifest(source.folder) for source in entry.sources}
            write_json(
                target / MANIFEST,
                {
                    "task": name,
                    "classes": entry.classes,
                    "unit": entry.unit,
                    "counts": counts,
                    "sources": packages,
                },
            )
        return folder

    def load_split(self, name: str, split: str) -> S:
        """Read one split of a prepared task (shuffled; every prefix is nearly balanced by class).

        Raises:
            ValueError: unknown task or split.
            FileNotFoundError: the task is not prepared; the message says how.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
        path = self.folder(name) / f"{split}{self.kind.suffix}"
        if not path.exists():
            hint = self.hint.format(name=name)
            raise FileNotFoundError(f"task {name} is not prepared: {hint}")
        return self.kind.load(path)

    def training_sample(self, name: str, count: int, seed: int) -> S:
        """`count` training examples (or all, if fewer), balanced by class, another draw a seed."""
        rng = np.random.default_rng([seed, *name.encode()])
        return _shorten(self.load_split(name, "train"), count, rng)


def _shorten(data: S, most: int, rng: np.random.Generator) -> S:
    """Shuffle a split so that classes take turns; keep at most `most` examples."""
    return data.take(balanced_order(data.labels, rng)[:most])
