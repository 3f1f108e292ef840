"""What a checkpoint has beside config and weights: tokenizer, processor, generation config.

The base has those of one model; a task's that differ from them lie in its adapter's folder, where
PEFT does not look, for `expand` to put back.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Collection
from pathlib import Path

from cart_plugin.checkpoints.headers import WEIGHT_SUFFIXES
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, CONFIG

FOLDER = "task_files"

_SUFFIXES = {
    *(".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"),
    *(".spm", ".codes", ".bpe"),
}
_OTHERS = {CONFIG, ADAPTER_CONFIG, "trainer_state.json"}
_GENERATION = "generation_config.json"
# What a merge writes about itself, or what belongs to one of the inputs only.
_OF_ITS_MAKING = ("README.md", "mergekit_config.yml", ADAPTER_CONFIG, "trainer_state.json")


def side_files(folder: Path) -> dict[str, Path]:
    """Those of a model, by name: no weights, and no records of its training."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _OTHERS
        if not path.name.endswith((".index.json", "_results.json"))
    }


def complete(folder: Path, source: Path) -> None:
    """Give a folder of weights what it lacks of `belongings`."""
    for name, path in belongings(source).items():
        if not (folder / name).exists():
            shutil.copyfile(path, folder / name)


def belongings(folder: Path) -> dict[str, Path]:
    """All files of a model but weights and records, by name; code and odd vocabularies, too."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in _OF_ITS_MAKING
        if path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")
    }


def copy_to_base(base: Path, models: Collection[Path]) -> None:
    """Give the base those of the first model that has a tokenizer."""
    for model in models:
        found = side_files(model)
        for name, path in found.items():
            if not (base / name).exists():
                shutil.copyfile(path, base / name)
        if found.keys() - {_GENERATION}:
            break  # a tokenizer's files belong together: all of one model


def keep(model: Path, base: Path, adapter: Path) -> tuple[list[str], list[str]]:
    """Store a model's that are not the base's.

    Args:
        model: folder of the task's model.
        base: folder of the finished base.
        adapter: the task's folder; ``adapter/task_files`` is made if there are any.

    Returns:
        Names of those that are stored, and of the base's that the model has not.
    """
    own, shared = side_files(model), side_files(base)
    different = [
        name
        for name, path in own.items()
        if name not in shared or not filecmp.cmp(path, shared[name], shallow=False)
    ]
    for name in different:
        (adapter / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(own[name], adapter / FOLDER / name)
    return different, [name for name in shared if name not in own]


def restore(base: Path, adapter: Path, absent: Collection[str], out: Path) -> None:
    """Give a task's model its own: the base's without those ``absent``, and its adapter's."""
    found = {name: path for name, path in side_files(base).items() if name not in absent}
    if (adapter / FOLDER).is_dir():
        found |= side_files(adapter / FOLDER)
    for name, path in found.items():
        shutil.copyfile(path, out / name)
