"""The tokenizer that a recipe asks for, stored for all workers, and for runs from another folder.

mergekit's knows the models by their paths; the file knows them by their order in the recipe.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from mergekit.tokenizer import TokenizerInfo

from cart_plugin.doctor.layout import references
from cart_plugin.execution.inputs import Inputs


def write(file: Path, tokenizer: TokenizerInfo, inputs: Inputs) -> None:
    """Store a tokenizer that was made for these models."""
    order = list(references(inputs.config).values())
    tables = tokenizer.permutations, tokenizer.original_vocabs
    by_number = [{order.index(model): held for model, held in table.items()} for table in tables]
    scratch = file.with_suffix(".new")
    scratch.write_bytes(pickle.dumps((tokenizer.tokenizer, *by_number)))
    scratch.replace(file)


def load(file: Path) -> Any:
    """What is stored.

    Raises:
        FileNotFoundError: nothing is.
        Exception: whatever half a pickle leads to.
    """
    return pickle.loads(file.read_bytes())  # this program's own


def read(file: Path, inputs: Inputs) -> TokenizerInfo | None:
    """The tokenizer for the same models, under whichever paths; None if none is stored."""
    try:
        tokenizer, *by_number = load(file)
    except FileNotFoundError:
        return None
    order = list(references(inputs.config).values())
    permutations, vocabularies = (
        {order[number]: held for number, held in table.items()} for table in by_number
    )
    return TokenizerInfo(
        tokenizer=tokenizer, permutations=permutations, original_vocabs=vocabularies
    )
