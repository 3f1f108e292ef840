"""Four tasks of definitions, from WordNet (two), GCIDE and FOLDOC.

The word that is defined is left out, so that no task can be learned by heart; it is also what is
held out: all definitions of one word are in one split.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.text.splits import Example, Split, at_most, split_examples

LEAST_WORDS = 4

# WordNet's files of noun senses (its "domains") with 1,000 senses at least.
DOMAINS = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "07": "attribute",
    "08": "body",
    "09": "cognition",
    "10": "communication",
    "11": "event",
    "13": "food",
    "14": "group",
    "15": "location",
    "17": "object",
    "18": "person",
    "20": "plant",
    "21": "possession",
    "23": "quantity",
    "26": "state",
    "27": "substance",
    "28": "time",
}
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

# GCIDE's labels of subjects with some 400 definitions at least, where subjects do not overlap.
FIELDS = (
    "Anat.",
    "Arch.",
    "Astron.",
    "Bot.",
    "Chem.",
    "Geol.",
    "Her.",
    "Law",
    "Mach.",
    "Math.",
    "Med.",
    "Mil.",
    "Min.",
    "Mus.",
    "Naut.",
    "Zool.",
)
TOPICS = (
    "communications",
    "company",
    "hardware",
    "jargon",
    "language",
    "mathematics",
    "networking",
    "operating system",
    "programming",
    "storage",
)

_FIELD = re.compile(r"\((" + "|".join(re.escape(field) for field in FIELDS) + r")\)\s+")
_FIELD_END = re.compile(r"\n\s*\n|\n\s*\[|\s--\s?[A-Z{]|\s\[[A-Z0-9]|\sNote:|\sSyn:|\s\d\. ")
_LABEL = re.compile(r"\((?:[A-Z][\w.]*[ &]*)+\.?\)")  # a further label inside a definition
_TOPIC = re.compile(r"^ {3}(?:\d+\. )?<([^<>\n]+)>\s+(.*?)(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)


def domains(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The domain of a noun sense from its WordNet definition; words are held out."""
    labels = {number: label for label, number in enumerate(DOMAINS)}
    path = folders["wordnet-base"] / "usr/share/wordnet/data.noun"
    examples = [
        Example(definition, labels[domain], word)
        for domain, word, definition in wordnet_senses(path)
        if domain in labels
    ]
    return split_examples(at_most(examples, 450, rng), rng)


def parts_of_speech(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """Noun, verb, adjective or adverb, from a sense's WordNet definition; words are held out."""
    examples = [
        Example(definition, label, word)
        for label, part in enumerate(PARTS_OF_SPEECH)
        for _, word, definition in wordnet_senses(
            folders["wordnet-base"] / f"usr/share/wordnet/data.{part}"
        )
    ]
    return split_examples(at_most(examples, 2000, rng), rng)


def wordnet_senses(path: Path) -> Iterator[tuple[str, str, str]]:
    """Domain number, first word and definition (without the examples) of each sense in a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        record, _, gloss = line.partition(" | ")
        definition = gloss.partition('; "')[0].strip()
        if len(definition.split()) >= LEAST_WORDS and not definition.startswith('"'):
            _, domain, _, _, word, *_ = record.split(" ")
            yield domain, word.partition("(")[0].lower(), definition


def fields(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The field (botany, law ...) of a definition in GCIDE, without its label; words held out."""
    path = folders["dict-gcide"] / "usr/share/dictd/gcide.dict.dz"
    return split_examples(at_most(gcide_definitions(_read(path)), 500, rng), rng)


def gcide_definitions(text: str) -> Iterator[Example]:
    """The definitions under one of the labels `FIELDS`, from the label to the end of its sense."""
    for entry in re.split(r"\n\s*\n(?=\S)", text):
        word = re.match(r"[\w' -]+", entry)
        if word is None:
            continue
        for label in _FIELD.finditer(entry):
            end = _FIELD_END.search(entry, label.end())
            definition = entry[label.end() : end.start() if end else None]
            definition = " ".join(re.sub(r"[{}]", "", _LABEL.sub(" ", definition)).split())
            if len(definition.split()) >= LEAST_WORDS and not definition.startswith("See "):
                yield Example(definition, FIELDS.index(label[1]), word[0].strip().lower())


def topics(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The topic of a computing term from a FOLDOC entry's first paragraph; terms are held out."""
    path = folders["dict-foldoc"] / "usr/share/dictd/foldoc.dict.dz"
    examples = at_most(foldoc_definitions(_read(path)), 600, rng)
    return split_examples(examples, rng)


def foldoc_definitions(text: str) -> Iterator[Example]:
    """The definitions under one of `TOPICS`; of several topics the first counts.

    The 250 country codes of the Internet, all alike, are left out.
    """
    for entry in re.split(r"\n(?=\S)", text):
        term, _, body = entry.partition("\n")
        for topic, definition in _TOPIC.findall(body):
            name = topic.split(",")[0].strip().lower()
            words = re.sub(r"[{}]", "", definition).split()
            if (
                name in TOPICS
                and len(words) >= LEAST_WORDS
                and words[1:4] != ["country", "code", "for"]
            ):
                yield Example(" ".join(words), TOPICS.index(name), term.strip().lower())


def _read(path: Path) -> str:
    """The text of a dictd file; its format is gzip's."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as handle:
        return handle.read()
