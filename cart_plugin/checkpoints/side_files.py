"""What a checkpoint has beside config and weights: tokenizer, processor, generation config.

The base has those of one model; a task's that differ from them lie in its adapter's folder, where
PEFT does not look, for `expand` to put back.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from cart_plugin.checkpoints.headers import WEIGHT_SUFFIXES
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, CONFIG
from cart_plugin.errors import CheckpointError

FOLDER = "task_files"
GENERATION = "generation_config.json"

_SUFFIXES = {
    *(".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"),
    *(".spm", ".codes", ".bpe"),
}
_OTHERS = {CONFIG, ADAPTER_CONFIG, "trainer_state.json"}
# What a merge writes about itself, or what belongs to one of the inputs only.
_OF_ITS_MAKING = ("README.md", "mergekit_config.yml", ADAPTER_CONFIG, "trainer_state.json")
# Other programs' weights: beside a merge, they would run the model that it was made from.
_FOREIGN = {
    *(".gguf", ".ggml", ".llamafile", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".onnx"),
    *(".onnx_data", ".npz", ".npy", ".tflite", ".mlmodel", ".pkl", ".pickle", ".joblib", ".pb"),
    *(".engine", ".nemo", ".mar", ".tar", ".xml"),  # .xml: OpenVINO's graph
}
_RECORDS = {".log", ".out", ".jsonl"}  # of a training, which may still be written
_TEMPLATES = "chat_template"
_TOKENIZER = (
    *("tokenizer", "vocab", "merges.txt", "special_tokens_map", "added_tokens", _TEMPLATES),
    *("tekken.json", "dict.txt", "byte_maps.json", "emoji.json", "normalizer.json"),
)
_VOCABULARIES = {".model", ".tiktoken", ".vocab", ".spm", ".codes", ".bpe", ".tokenizer"}
# A tokenizer's files that are nothing without a vocabulary.
_ADDITIONS = ("special_tokens_map", "added_tokens", "tokenizer_config", _TEMPLATES)
_MODULES = "modules.json"  # of sentence-transformers: folders of what follows the transformer


def side_files(folder: Path) -> dict[str, Path]:
    """Those of a model, by name: no weights, and no records of its training."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _OTHERS
        if not path.name.endswith((".index.json", "_results.json"))
    }


def complete(folder: Path, sources: Sequence[Path]) -> None:
    """Give a folder of weights what it lacks of `belongings`, and the weights of its modules.

    Args:
        folder: of the weights.
        sources: whose files it gets, the best first. A tokenizer's are all of the first that has a
            vocabulary, and modules of the first that names some: parts of two do not fit. A chat
            template fits the tokenizers of those behind.
    """
    found = [belongings(source) | module_weights(source) for source in sources]

    def first(is_wanted: Callable[[str], bool], otherwise: int = len(sources)) -> int:
        having = (number for number, files in enumerate(found) if any(map(is_wanted, files)))
        return next(having, otherwise)

    tokenizer = first(_is_vocabulary, otherwise=first(is_tokenizer))
    modules = first(is_of_modules)
    for number, files in enumerate(found):
        for name, path in files.items():
            if is_tokenizer(name):
                is_template = name.startswith(_TEMPLATES)
                taken = number == tokenizer or (is_template and number < tokenizer)
            else:
                taken = number == modules or not is_of_modules(name)
            if taken:
                put(path, folder / name)


def is_tokenizer(name: str) -> bool:
    """Whether a side file is a part of the model's tokenizer; code is none."""
    if "/" in name or name.endswith(".py"):
        return False
    return (
        name.startswith(_TOKENIZER)
        or name.endswith("vocab.json")
        or Path(name).suffix in _VOCABULARIES
    )


def _is_vocabulary(name: str) -> bool:
    return is_tokenizer(name) and not name.startswith(_ADDITIONS)


def is_of_modules(name: str) -> bool:
    """Whether a file is modules.json, or of a folder that it names."""
    return name == _MODULES or "/" in name


def put(file: Path, place: Path) -> None:
    """Copy a file to where there is none."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def belongings(folder: Path) -> dict[str, Path]:
    """All files of a model but weights and records, by name; code and odd vocabularies, too.

    Those of the folders that modules.json names have their path in the model's folder as name.
    """
    own = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in _OF_ITS_MAKING and path.suffix not in _RECORDS
        if not path.name.startswith(".") and not _is_weights(path.name)
    }
    return own | {name: path for name, path in _of_modules(folder) if not _is_weights(name)}


def module_weights(folder: Path) -> dict[str, Path]:
    """The weight files of the folders that modules.json names, by their path in the model's."""
    return {
        name: path for name, path in _of_modules(folder) if path.suffix.lower() in WEIGHT_SUFFIXES
    }


def check_modules(donor: Path, models: Collection[Path]) -> None:
    """Refuse modules with weights of their own, of which a merge would have one model's.

    Args:
        donor: the folder whose side files the merge gets.
        models: the folders of all inputs.

    Raises:
        CheckpointError: not all models hold the donor's, byte by byte.
    """
    for name, path in module_weights(donor).items():
        for model in models:
            other = model / name
            if not other.is_file() or not filecmp.cmp(path, other, shallow=False):
                raise CheckpointError(
                    f"{_MODULES} of {donor} names weights that are not merged, and {name} there "
                    f"is not what {model} has",
                    f"move {_MODULES} out of {donor} for the merge, and merge the weight files of "
                    "its modules by themselves (mergekit-pytorch)",
                )


def _is_weights(name: str) -> bool:
    """Whether a file holds weights or names their places, in any program's format."""
    *before, last = Path(name.lower()).suffixes or [""]
    if last in _SUFFIXES or last == ".py":
        return name.endswith(".index.json")
    # Parts have theirs at the end: `.gguf.part1of2`, `.ckpt.data-00000-of-00001`.
    return any(suffix in _FOREIGN or suffix in WEIGHT_SUFFIXES for suffix in (*before, last))


def _of_modules(folder: Path) -> Sequence[tuple[str, Path]]:
    """The files of the folders that modules.json names, by their path in the model's folder."""
    try:
        listed = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        paths = [Path(module["path"]) for module in listed if module["path"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []  # there is none, or sentence-transformers does not take it either
    inside = [folder / path for path in paths if not path.is_absolute() and ".." not in path.parts]
    return [
        (path.relative_to(folder).as_posix(), path)
        for module in inside
        if module != folder
        for path in sorted(module.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]


def _of_task(folder: Path) -> dict[str, Path]:
    """What `expand` gives back to a model beside config and weights; records of its training not.

    Weights of its modules are among them: no adapter holds those.
    """
    found = belongings(folder) | module_weights(folder)
    kept = (name for name in found if name != CONFIG and not name.endswith("_results.json"))
    return {name: found[name] for name in kept}


def copy_to_base(base: Path, models: Collection[Path]) -> None:
    """Give the base those of the first model that has a tokenizer."""
    for model in models:
        for name, path in _of_task(model).items():
            put(path, base / name)
        if side_files(model).keys() - {GENERATION}:
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
    own, shared = _of_task(model), _of_task(base)
    different = [
        name
        for name, path in own.items()
        if name not in shared or not filecmp.cmp(path, shared[name], shallow=False)
    ]
    for name in different:
        put(own[name], adapter / FOLDER / name)
    return different, [name for name in shared if name not in own]


def restore(base: Path, adapter: Path, absent: Collection[str], out: Path) -> None:
    """Give a task's model its own: its adapter's, and the base's without those ``absent``."""
    kept = adapter / FOLDER
    for path in sorted(kept.rglob("*")) if kept.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            put(path, out / path.relative_to(kept))
    for name, path in _of_task(base).items():
        if name not in absent:
            put(path, out / name)
