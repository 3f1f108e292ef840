"""The way back: one task's full checkpoint, or its tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from cart_plugin.checkpoints import names as naming
from cart_plugin.checkpoints import side_files, writing
from cart_plugin.checkpoints.adapters import BASE_RECORD
from cart_plugin.checkpoints.digests import digest
from cart_plugin.checkpoints.files import check_space, read_json, unfinished, write_json
from cart_plugin.checkpoints.names import Unit
from cart_plugin.checkpoints.reading import CONFIG, Checkpoint, read_config
from cart_plugin.compress.inputs import open_model
from cart_plugin.compress.layers import Structure
from cart_plugin.compress.report import FILE
from cart_plugin.compress.stored import StoredAdapter
from cart_plugin.compress.work import ADAPTERS, BASE, TASK_CONFIG, Progress
from cart_plugin.errors import CartError, CheckpointError


def tasks(folder: str | Path) -> list[str]:
    """Names of the tasks of a folder that `compress` has written.

    Raises:
        CartError: it is no such folder.
    """
    return list(_entries(Path(folder)))


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """What the report says of each task."""
    broken = CartError(
        f"{root} is no folder that `mergekit-cart compress` has written: {FILE} is missing or "
        "broken"
    )
    try:
        found = dict(read_json(root / FILE)["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        raise broken from None
    for name, entry in found.items():
        absent = entry.get("absent_files", []) if isinstance(entry, Mapping) else None
        if not isinstance(absent, list) or Path(name).name != name:
            raise broken
    return found


def task_tensors(folder: str | Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """One task's tensors, one after the other, under the names of its checkpoint.

    Args:
        folder: written by `compress`.
        name: one of `tasks(folder)`.

    Raises:
        CartError: there is no such folder or task, or files are missing.
    """
    task = _Task(Path(folder), name)
    for unit in task.units:
        yield from task.restored(unit).items()


def load_task(folder: str | Path, name: str) -> dict[str, Tensor]:
    """One task's whole state dict, under the names of its checkpoint; see `task_tensors`."""
    return dict(task_tensors(folder, name))


def expand(
    folder: str | Path, name: str, out: str | Path, *, progress: Progress | None = None
) -> None:
    """Write one task's full checkpoint, as it was before `compress` but for what that has lost.

    Args:
        folder: written by `compress`.
        name: one of `tasks(folder)`.
        out: the folder to write; must not exist, or be empty. It appears when all is done.
        progress: is told how far the work is.

    Raises:
        CartError: as `task_tensors`; ``out`` exists, or the disk is full.
    """
    task = _Task(Path(folder), name)
    layout = task.base.layout
    files = writing.shards(layout)
    with unfinished(Path(out)) as place:
        check_space(place, writing.file_bytes(layout))
        with ExitStack() as stack:
            opened = {}
            for file, part in files.items():
                writer = stack.enter_context(writing.TensorFile(place / file, part))
                opened.update(dict.fromkeys(part, writer))
            for done, unit in enumerate(task.units, 1):
                for source, tensor in task.restored(unit).items():
                    opened[source].write(source, tensor)
                if progress is not None:
                    progress("expanding", done, len(task.units))
        writing.write_index(place, files)
        side_files.restore(task.base.path, task.place, task.absent_files, place)
        config = task.base.config
        if task.config is not None:
            dtype = config.get("dtype")
            names = ("dtype", "torch_dtype")  # the base's counts
            config = {key: value for key, value in task.config.items() if key not in names}
            if dtype is not None:
                config["dtype"] = dtype
        write_json(place / CONFIG, config, sort_keys=True)


def check_base(place: Path, name: str, base: Checkpoint) -> None:
    """Refuse a base that is not the one which an adapter was made around.

    Args:
        place: the adapter's folder.
        name: what errors call it.
        base: the base.

    Raises:
        CartError: it is another one, or nothing says which it was.
    """
    if not (place / BASE_RECORD).is_file():
        raise CheckpointError(
            f"adapter {name} has no {BASE_RECORD}, which says around what base it was made",
            "copy the whole folder that `compress` wrote, or compress the models again",
        )
    made_for = read_config(place, f"adapter {name}", BASE_RECORD).get("digest")
    if made_for != digest(base):
        raise CheckpointError(
            f"adapter {name} was made around other weights than those in {base.path}, such as an "
            "earlier base in its place",
            "name the base that `compress` wrote with it, or compress the models again",
        )


class _Task:
    """A base and one adapter."""

    def __init__(self, folder: Path, name: str) -> None:
        known = _entries(folder)
        if name not in known:
            raise CartError(f"{folder} has no task {name!r}; it has {', '.join(known)}")
        self.place = place = folder / ADAPTERS / name
        self.absent_files = [str(file) for file in known[name].get("absent_files", [])]
        self.base = open_model(folder / BASE, f"the base of {folder}")
        check_base(place, name, self.base)
        own = (place / TASK_CONFIG).exists()
        self.config = read_config(place, f"adapter {name}", TASK_CONFIG) if own else None
        meta = naming.meta_model(self.base.path, self.base.config, self.base.name)
        shapes = {source: stored.shape for source, stored in self.base.tensors.items()}
        self.units = naming.units(meta, shapes)
        targets = [target for unit in self.units for target in unit.targets]
        self._adapter = StoredAdapter(place, name, Structure(meta, targets))

    def restored(self, unit: Unit) -> dict[str, Tensor]:
        """A unit's tensors in the checkpoint, in the base's dtype."""
        stored = {source: self.base.read(source) for source in unit.sources}
        if not unit.targets:
            return stored
        found = {
            name: self._adapter.applied(name, tensor)
            for name, tensor in unit.to_model(stored).items()
        }
        return unit.to_checkpoint(found)
