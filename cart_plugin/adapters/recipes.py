"""The options of a merge of adapters from a YAML file.

::

    adapters:
      - adapter: ./adapters/math
        weight: 2.0
      - adapter: ./adapters/code
        name: programs
      - adapter: ./adapters/german
    method: auto
    rank: 16

The keys are the command's options; paths are relative to where the command is run, as mergekit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_plugin.errors import CartError, CheckpointError, first_line

_OPTIONS = {
    **{key: key for key in ("method", "rank", "rank_ratio", "keep", "dtype", "base")},
    "lambda": "lambda_",
}
_OF_ADAPTER = ("adapter", "name", "weight")
_PLURALS = {"name": "names", "weight": "weights"}
_RULES = {"rank_ratio", "keep"}


def read_recipe(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `cart_plugin.adapters.merge_adapters` from a recipe and a command line.

    Args:
        file: the recipe.
        given: what takes the place of the recipe's, a rank rule that of its other one.

    Raises:
        CartError: it cannot be read, or has keys that mean nothing.
    """
    import yaml

    from cart_plugin.checkpoints import recipes

    try:
        found = recipes.read(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CartError(f"{file} cannot be read: {first_line(error)}") from None
    except CheckpointError as error:
        raise CartError(f"{file}: {error}") from None
    if not isinstance(found, Mapping) or not isinstance(found.get("adapters"), list):
        raise CartError(
            f"{file} has no list of adapters; write one, as in `adapters: [adapter: ./math, "
            "adapter: ./code]`"
        )
    for key, plural in _PLURALS.items():
        if plural in found:
            raise CartError(f"{file}: give each adapter its `{key}:`, beside `adapter:`")
    _check_keys(found, ("adapters", *_OPTIONS), str(file))
    entries = [_entry(entry, file) for entry in found["adapters"]]
    arguments: dict[str, Any] = {
        _OPTIONS[key]: value for key, value in found.items() if key in _OPTIONS
    }
    arguments["adapters"] = [entry["adapter"] for entry in entries]
    for key, plural in _PLURALS.items():
        if any(key in entry for entry in entries):
            otherwise = 1.0 if key == "weight" else None
            arguments[plural] = [entry.get(key, otherwise) for entry in entries]
    if _RULES & given.keys():
        arguments = {key: value for key, value in arguments.items() if key not in _RULES}
    return {**arguments, **given}


def _entry(entry: object, file: Path) -> Mapping[str, Any]:
    if isinstance(entry, str):
        return {"adapter": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("adapter"), str):
        raise CartError(
            f"{file}: {entry!r} names no adapter; write `adapter:` and a folder, or just the folder"
        )
    _check_keys(entry, _OF_ADAPTER, f"{file}: {entry['adapter']}")
    return entry


def _check_keys(found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise CartError(f"{where}: {key!r} means nothing here; known are {', '.join(known)}")
