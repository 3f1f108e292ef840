"""The task of molecules: on which protein was the molecule tested, from its SMILES string."""

from __future__ import annotations

import csv
import re
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.text.splits import Example, Split, at_most, split_examples

# MoleculeACE's tables with many molecules, one of each family of proteins.
TARGETS = {
    "thrombin": "CHEMBL204_Ki",
    "5-HT1A receptor": "CHEMBL214_Ki",
    "mu opioid receptor": "CHEMBL233_Ki",
    "PPAR gamma": "CHEMBL235_EC50",
    "histamine H3 receptor": "CHEMBL264_Ki",
    "factor Xa": "CHEMBL244_Ki",
    "orexin receptor 2": "CHEMBL4792_Ki",
    "PIM1 kinase": "CHEMBL2147_Ki",
}
_TABLES = "MoleculeACE/Data/benchmark_data"

_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|[A-Za-z]|%\d\d|\d|[().]")
_ELEMENT = re.compile(r"\[?\d*(Br|Cl|[A-Za-z])")


def targets(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The protein of a molecule; scaffolds are held out, molecules of two proteins are dropped."""
    examples = []
    for label, table in enumerate(TARGETS.values()):
        path = folders["MoleculeACE"] / _TABLES / f"{table}.csv"
        with path.open(encoding="utf-8", newline="") as handle:
            smiles = [row["smiles"] for row in csv.DictReader(handle)]
        examples += [Example(text, label, scaffold(text)) for text in smiles]
    return split_examples(at_most(examples, 1200, rng), rng)


def scaffold(smiles: str) -> str:
    """A name that two molecules share if their rings and what links the rings are the same.

    It is a hash of what is left when all chain ends are cut off again and again (the scaffold of
    Bemis and Murcko), with elements but without bond orders. A molecule without rings is its own.
    """
    elements, neighbours = _graph(smiles)
    ends = [atom for atom in neighbours if len(neighbours[atom]) <= 1]
    while ends:
        atom = ends.pop()
        for other in neighbours.pop(atom, set()):
            neighbours[other].discard(atom)
            if len(neighbours[other]) == 1:
                ends.append(other)
    if not neighbours:
        return smiles
    # Weisfeiler and Lehman: each round an atom's name takes in those of its neighbours.
    names = {atom: elements[atom] for atom in neighbours}
    for _ in range(8):
        names = {
            atom: _short([names[atom], *sorted(names[other] for other in near)])
            for atom, near in neighbours.items()
        }
    return _short(sorted(names.values()))


def _graph(smiles: str) -> tuple[list[str], dict[int, set[int]]]:
    """Elements (upper case) of the atoms, and the atoms that each is bound to."""
    elements: list[str] = []
    neighbours: dict[int, set[int]] = defaultdict(set)
    open_rings: dict[str, int] = {}
    branches: list[int | None] = []
    last: int | None = None
    for token in _TOKEN.findall(smiles):
        bond: int | None = None
        if token == "(":
            branches.append(last)
        elif token == ")":
            last = branches.pop()
        elif token == ".":
            last = None
        elif token[0] in "%0123456789":
            if token in open_rings:
                bond = open_rings.pop(token)
            elif last is not None:
                open_rings[token] = last
        else:
            found = _ELEMENT.match(token)
            elements.append(found[1].upper() if found else token)
            bond, last = last, len(elements) - 1
            neighbours[last] = set()
        if bond is not None and last is not None:
            neighbours[bond].add(last)
            neighbours[last].add(bond)
    return elements, neighbours


def _short(parts: list[str]) -> str:
    return format(zlib.crc32(" ".join(parts).encode()), "08x")
