"""What is finished, and of which merge: files in a folder beside the result.

`journal.json` says which merge it is. Each finished part has a record of its own, written by its
maker when all of it is in its shard's file, so that nobody has to be asked, and nothing is lost
with whoever waits for the workers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from cart_plugin import linalg, merging
from cart_plugin import mergekit as adapter
from cart_plugin.checkpoints import side_files, writing
from cart_plugin.checkpoints.digests import file_digest, tensor_digest
from cart_plugin.checkpoints.files import MAKING, read_json, write_json
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.reading import CONFIG, MERGEKIT_ORDER, Checkpoint
from cart_plugin.distributed import plan, vocabulary
from cart_plugin.distributed.plan import Part, Shard
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution.inputs import Inputs, plain

_REVISION = 4  # raised when the files here come to mean something else
_PACKAGES = ("cart-plugin", "mergekit", "torch", "transformers", "scipy", "safetensors")
# Of mergekit's options those that change neither a tensor nor where it lies.
_WITHOUT_EFFECT = {
    *("verbosity", "quiet", "async_write", "write_threads", "write_model_card", "copy_tokenizer"),
    *("num_threads", "lazy_unpickle", "clone_tensors", "transformers_cache", "lora_merge_cache"),
    *("read_to_gpu", "cuda", "gpu_rich", "multi_gpu"),
}
_GONE = "removed-"  # how names of what is being removed begin
_PATIENCE = 90.0  # seconds in which a file system shows what another machine has written


@dataclass(frozen=True)
class Places:
    """The files of one merge in the making.

    Attributes:
        folder: of all of them; no other merge uses it.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The folder that becomes the result."""
        return self.folder / "model"

    @property
    def records(self) -> Path:
        """A file for each finished part."""
        return self.folder / "records"

    @property
    def progress(self) -> Path:
        """A file for each part that was begun, by `progress`."""
        return self.folder / "progress"

    @property
    def job(self) -> Path:
        """What mergekit merges."""
        return self.folder / "job.json"

    @property
    def plan(self) -> Path:
        """The shards, by `plan`."""
        return self.folder / "plan.json"

    @property
    def settings(self) -> Path:
        """What workers have to know beside the job."""
        return self.folder / "settings.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the recipe asks for, if it does, by `vocabulary`."""
        return self.folder / "tokenizer.pickle"

    @property
    def is_planned(self) -> bool:
        """Whether all is there that workers go by; a machine that lost its power leaves parts.

        Raises:
            CartError: it cannot be told, which is no reason to lose what is finished.
        """
        try:
            plan.read(self.plan)
            if read_json(self.settings)["tokenizer"]:
                vocabulary.load(self.tokenizer)
        except FileNotFoundError:
            return False
        except (OSError, MemoryError) as error:
            raise CartError(
                f"the plan in {self.folder} cannot be read: {first_line(error)}; what is finished "
                "stays there for the same command"
            ) from None
        except Exception:  # whatever half a file, or a pickle, may lead to
            return False
        return True

    def record(self, part: Part) -> Path:
        """The record of a part."""
        return self.records / f"{part.shard.file}.{part.number}.json"

    def make(self) -> None:
        """Make the folders."""
        for folder in (self.model, self.records, self.progress):
            folder.mkdir(parents=True, exist_ok=True)


def identity(
    inputs: Inputs, route: str, options: MergeOptions, threads: int, *, whole: bool
) -> dict[str, Any]:
    """All that the bytes of a merge depend on, in parts that a message can name.

    Of the files that it is made of: names, sizes, times and a few pages. Reading terabytes to see
    whether they have changed would take as long as the merge. Models that differ in few tensors may
    look alike where sizes and times do.

    Args:
        inputs: the recipe with whole models.
        route: the way that its tensors are merged.
        options: mergekit's.
        threads: of a worker: the same product by more threads rounds differently.
        whole: whether a shard is made by one worker, as `plan.foresee` has it.

    Raises:
        CartError: a file cannot be read.
    """
    files = {
        f"model {label}": _states(
            held.path,
            [
                *_weights_and_config(held),
                *_belongings(held.path, of_donor=held.path == inputs.donor.path),
            ],
        )
        for label, held in inputs.checkpoints.items()
    }
    source = inputs.config.tokenizer.source if inputs.config.tokenizer else None
    source = source or inputs.config.tokenizer_source
    if isinstance(source, ModelReference) and Path(source.model.path).is_dir():
        folder = Path(source.model.path)  # it may be none of the models
        own = _belongings(folder, of_donor=False)
        files.setdefault(f"model {source}", _states(folder, [*own, folder / CONFIG]))
    numbers = [_REVISION, linalg.REVISION, merging.REVISION, adapter.REVISION]
    settings = {
        f"--{name.replace('_', '-')}": value
        for name, value in options.model_dump(mode="json").items()
        if name not in _WITHOUT_EFFECT
    }
    found: dict[str, Any] = {"the recipe": plain(inputs.config), **files}
    found |= {package: version(package) for package in _PACKAGES}
    found |= {"the revision of this program": numbers, **settings, "threads a worker": threads}
    found |= {"work on a cluster": whole, "the way to merge": route}
    return _plainly(found)


def _weights_and_config(held: Checkpoint) -> list[Path]:
    """Its weight files, the index that says which of them holds which tensor, and its config."""
    indexes = [held.path / name for name in MERGEKIT_ORDER if name.endswith(".json")]
    return [*held.files, *indexes, held.path / CONFIG]


def _belongings(folder: Path, *, of_donor: bool) -> list[Path]:
    """What the result has of a model's other files, or its tokenizer takes."""
    found = side_files.belongings(folder) | (side_files.module_weights(folder) if of_donor else {})
    return [path for name, path in found.items() if of_donor or side_files.is_tokenizer(name)]


def _states(folder: Path, files: Iterable[Path]) -> list[tuple[str, int, int, str]]:
    found = []
    for file in sorted(set(files)):
        try:
            if file.is_file():
                state, name = file.stat(), file.relative_to(folder).as_posix()
                found.append((name, state.st_size, state.st_mtime_ns, file_digest(file)))
        except OSError as error:
            raise CartError(f"{file} cannot be read: {error.strerror or error}") from None
    return found


def _plainly(found: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    plainly: dict[str, Any] = json.loads(json.dumps(found))
    return plainly


def presence(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """What tells at little cost that weights on this machine have been replaced, by file."""
    files = [file for held in inputs.checkpoints.values() for file in held.files]
    states = {str(file): file.stat() for file in files if file.exists()}
    return {
        name: (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        for name, state in states.items()
    }


def surroundings(inputs: Inputs, labels: Iterable[str]) -> dict[str, Any]:
    """What has to be the same for all workers, and from the first tensor to the last.

    Versions, and the weights and configs of the models, as in `identity`.

    Args:
        inputs: the recipe, by `tasks.everywhere`.
        labels: of its models in the recipe as it was given: folders may be moved as a whole.
    """
    files = {
        f"model {label}": _states(held.path, _weights_and_config(held))
        for label, held in zip(labels, inputs.checkpoints.values(), strict=True)
    }
    return _plainly({**{package: version(package) for package in _PACKAGES}, **files})


def check_surroundings(places: Places, inputs: Inputs) -> None:
    """Refuse to go on where something else is found than was planned for.

    Raises:
        CartError: another version, or a model that has changed.
    """
    settings = read_json(places.settings)
    planned, found = settings["surroundings"], surroundings(inputs, settings["labels"])
    if found != planned:
        raise CartError(
            f"{socket.gethostname()} does not find what the merge was planned for: "
            f"{_difference(planned, found)}; leave the models alone while they are merged, and "
            "give all machines the same folders and versions"
        )


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a result whose inputs have changed while it was made.

    Args:
        before: by `identity`.
        now: the same, later.

    Raises:
        CartError: they have.
    """
    if before != now:
        raise CartError(
            f"{_difference(before, now)} while it was merged; leave the models alone until the "
            "merge is finished"
        )


def open_journal(folder: Path, identity: Mapping[str, Any], tell: Callable[[str], None]) -> Places:
    """The places of a merge; what is there of another merge is removed.

    Args:
        folder: beside the result.
        identity: by `identity`.
        tell: receives a line that says why nothing of an earlier run is used, if there was one.
    """
    file = folder / "journal.json"
    text = json.dumps(identity, sort_keys=True)
    places = Places(folder / f"{MAKING}{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    try:
        before = read_json(file)["identity"]
    except (OSError, ValueError, KeyError):
        before = None
    if before is not None and before != identity:
        tell(f"starting anew: {_difference(before, identity)}")
    is_planned = places.is_planned
    if places.plan.is_file() and not is_planned:
        tell("starting anew: the plan of the interrupted merge is broken")
    for other in [*folder.glob(f"{_GONE}*"), *folder.glob(f"{MAKING}*")]:
        # Without a plan nothing says what the records are of.
        if other != places.folder or not is_planned:
            _remove(other)
    write_json(file, {"identity": identity})
    places.make()
    for old in places.progress.glob("*.json"):
        old.unlink()
    return places


def _remove(folder: Path) -> None:
    """Remove a folder that is never found half there, and that workers cannot come back to."""
    gone = folder
    if not folder.name.startswith(_GONE):
        gone = folder.with_name(f"{_GONE}{folder.name}")
        folder.rename(gone)
    shutil.rmtree(gone)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for name, value in now.items():
        if name not in before:
            return f"{name} is new"
        if before[name] == value:
            continue
        if isinstance(value, list | dict):
            changed = _changed_files(before[name], value) if name.startswith("model ") else ""
            return f"{name} has changed{changed}"
        return f"{name} is {value}, was {before[name]}"
    gone = next((name for name in before if name not in now), "the recipe")
    return f"{gone} is gone"


def _changed_files(before: Any, now: Any) -> str:
    old, new = ({entry[0]: entry for entry in entries} for entries in (before, now))
    gone = next((f"{name} is gone" for name in old if name not in new), None)
    found = gone or next((name for name in new if old.get(name) != new[name]), None)
    return "" if found is None else f" ({found})"


def record(places: Places, part: Part, facts: Mapping[str, Any]) -> None:
    """Note that a part is finished."""
    write_json(places.record(part), facts)


def reserve(places: Places, shards: Iterable[Shard]) -> None:
    """Make the shards' files, in which workers write, as far as they are not there."""
    for shard in shards:
        file = places.model / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            writing.reserve(file, shard.layout)
        else:  # a machine that lost its power may have lost this, and digests are of the data
            writing.restore_header(file, shard.layout)


def records(places: Places, parts: Iterable[Part]) -> list[dict[str, Any]]:
    """The records of parts that are all made.

    Network file systems show late what another machine has written.

    Raises:
        CartError: one is not there.
    """
    found, until = [], time.monotonic() + _PATIENCE
    for part in parts:
        file = places.record(part)
        while not file.is_file():
            if time.monotonic() >= until:
                raise CartError(
                    f"{part.name} was made, and {file} that says so is not to be seen here; do all "
                    "machines share this folder?"
                )
            time.sleep(1)
        found.append(read_json(file))
    return found


def is_whole(places: Places, part: Part) -> bool:
    """Whether a part is finished, and each of its tensors what it was when it was made."""
    name = part.shard.file
    file = places.model / name
    try:
        digests = read_json(places.record(part))["digests"]
        held = Checkpoint(name, file, {}, read_header(file, name), [file])
    except (OSError, ValueError, KeyError):
        return False
    if digests.keys() != {output.name for output in part.outputs}:
        return False
    if held.layout != part.shard.layout:
        return False
    try:
        return all(tensor_digest(held.read(name)) == digest for name, digest in digests.items())
    except CartError:
        return False
