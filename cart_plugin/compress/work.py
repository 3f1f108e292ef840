"""What the steps of one compression share: models, options, names, and how tensors are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cart_plugin.checkpoints.dtypes import STORED
from cart_plugin.checkpoints.files import json_text
from cart_plugin.checkpoints.names import Unit
from cart_plugin.checkpoints.placement import is_computed
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Assignment, Structure
from cart_plugin.compress.ranks import checked_rule
from cart_plugin.compress.report import Report
from cart_plugin.compress.servers import Layout, checked_layout
from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import SOLVERS

BASE = "base"
ADAPTERS = "adapters"
TASK_CONFIG = "task_config.json"

_OF_TENSORS = ("weight", "bias")
_HOLDERS = (nn.ModuleDict(), nn.ParameterDict())

_CHUNK = 2**16  # numbers: their copy in fp64 stays in the cache, five times as fast as of 2**18

Progress = Callable[[str, int, int], None]
"""Is told a step, how many of its tensors are done, and their number."""


@dataclass(frozen=True)
class Options:
    """What a caller has asked for, checked.

    Attributes:
        rule: how many directions each layer keeps; None with a target size.
        target_size: share of the models' bytes.
        layout: what the adapters may hold.
        dtype: of the result; None for the models' own.
        drop_small: leave all but LoRA layers as the base has them.
        small_error: leave those of them that differ by no more than this, relatively.
        svd: solver.
        seed: of the solver.
    """

    rule: RankRule | None
    target_size: float | None
    layout: Layout
    dtype: torch.dtype | None
    drop_small: bool
    small_error: float
    svd: str
    seed: int


@dataclass
class Work:
    """What the steps of one compression share; ``given`` is the model to be the base, if any."""

    models: list[Checkpoint]
    given: Checkpoint | None
    options: Options
    units: list[Unit]
    structure: Structure
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    progress: Progress
    report: Report
    changed: set[str] = field(default_factory=set)  # names in the checkpoint

    @property
    def described(self) -> Checkpoint:
        """The model whose config the base has: the given one, else the first."""
        return self.given or self.models[0]

    @property
    def computed(self) -> set[str]:
        """Names in the checkpoint of what models compute anew; see `is_computed`."""
        info = self.described.tensors
        loose = [source for unit in self.units if not unit.targets for source in unit.sources]
        return {name for name in loose if name in info and is_computed(name, info[name])}

    def versions(self, name: str) -> Iterator[Tensor]:
        """A checkpoint's tensor of each model, one at a time."""
        for model in self.models:
            yield model.read(name)

    def dtype(self, unit: Unit) -> torch.dtype:
        """In which a unit's tensors are stored."""
        return self.layout[unit.sources[0]][0]


def checked_options(
    rank_ratio: float | None,
    rank: int | None,
    energy: float | None,
    target_size: float | None,
    layout: str,
    dtype: str | None,
    drop_small: bool,
    small_error: float,
    svd: str,
    seed: int,
) -> Options:
    """The options of `compress`.

    Raises:
        CartError: a value out of range, or two rules at once.
    """
    rule = checked_rule(rank_ratio, rank, energy, target_size)
    if dtype is not None and dtype not in STORED:
        raise CartError(f"dtype must be one of {', '.join(STORED)}, got {dtype!r}")
    if svd not in SOLVERS:
        raise CartError(f"svd must be one of {', '.join(SOLVERS)}, got {svd!r}")
    number = isinstance(small_error, (int, float)) and not isinstance(small_error, bool)
    if not (number and 0 <= small_error < 1):
        raise CartError(f"small_error must be at least 0 and below 1, got {small_error!r}")
    if drop_small and small_error:
        raise CartError(
            f"drop_small leaves out more than small_error={small_error}; give one of them"
        )
    if layout == "servers" and small_error:
        raise CartError(
            f"layout='servers' leaves out more than small_error={small_error}; give one of them"
        )
    found = STORED[dtype] if dtype else None
    fixed = checked_layout(layout)
    alone = drop_small or fixed == "servers"
    return Options(rule, target_size, fixed, found, alone, small_error, svd, seed)


def checked_names(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """The adapters' names: those given, or those of the models' folders, with "_" for dots.

    PEFT makes them names of modules, in which a dot ends a level.

    Raises:
        CartError: too few models, names that do not fit them, or that name no folder.
    """
    if len(paths) < 2:
        raise CartError(
            f"compression needs at least two models to share a base, got {len(paths)}; of one "
            "model and its base give both as models (and the base as --base), or use "
            "mergekit-extract-lora"
        )
    if names is None:
        chosen = [path.resolve().name.replace(".", "_") for path in paths]
    else:
        chosen = list(names)
    for name in chosen:
        if chosen.count(name) > 1:
            raise CartError(f"two models are called {name!r}; give each a name of its own (names)")
        if not name or any(sign in name for sign in "/\\"):
            raise CartError(f"{name!r} cannot name an adapter's folder; give another name (names)")
        if "." in name:
            free = name.replace(".", "_")
            raise CartError(
                f"{name!r} cannot name an adapter: PEFT takes no dots; use {free!r}, say (names)"
            )
        # PEFT keeps adapters in modules and looks for their names at the ends of tensors'.
        if name in _OF_TENSORS or any(hasattr(holder, name) for holder in _HOLDERS):
            raise CartError(
                f"{name!r} cannot name an adapter: to PEFT it means something else; use "
                f"{f'{name}_'!r}, say (names)"
            )
    if len(chosen) != len(paths):
        raise CartError(f"{len(paths)} models but {len(chosen)} names")
    return chosen


def stored_dtype(models: Sequence[Checkpoint], name: str, asked: torch.dtype | None) -> torch.dtype:
    """In which a tensor is stored: as asked, else as the models' promote; integers as they are."""
    dtype = models[0].dtype(name)
    for model in models[1:]:
        dtype = torch.promote_types(dtype, model.dtype(name))
    return asked if asked is not None and dtype.is_floating_point else dtype


def differences(
    work: Work, base: Checkpoint, wanted: set[str], step: str
) -> Iterator[tuple[int, Unit, str, Tensor, Tensor]]:
    """Task, unit, name, the task's tensor and the base's of all tensors in ``wanted``."""
    units = [unit for unit in work.units if wanted.intersection(unit.targets or unit.sources)]
    total = len(units) * len(work.models)
    for number, unit in enumerate(units):
        here = {source: base.read(source) for source in unit.sources}
        around = unit.to_model(here) if unit.targets else here
        del here
        for task, model in enumerate(work.models):
            values = {source: model.read(source) for source in unit.sources}
            there = unit.to_model(values) if unit.targets else values
            del values
            for name in list(there):
                if name in wanted:
                    yield task, unit, name, there.pop(name), around[name]
            work.progress(step, number * len(work.models) + task + 1, total)
        del around, there  # before the next ones are read


def stored_dtypes(work: Work) -> dict[str, torch.dtype]:
    """In which dtype each of the model's tensors is stored."""
    return {target: work.dtype(unit) for unit in work.units for target in unit.targets}


def exact_layout(
    work: Work, assignment: Assignment
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what an adapter stores whole, by its name in the file."""
    dtypes = stored_dtypes(work)
    return {
        peft_files.exact_name(name): (dtypes[source], tuple(work.structure.state[name].shape))
        for name, source in assignment.exact.items()
    }


def config_text(
    work: Work, assignment: Assignment, task_ranks: Mapping[str, int], task_type: str | None
) -> str:
    """An adapter's config; its base lies where the folder will be when all is done."""
    base = str(work.report.out.absolute() / BASE)
    modules = work.structure.modules
    kind = type(modules[""])
    return peft_files.config_text(
        assignment,
        task_ranks,
        modules,
        base,
        task_type,
        {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )


def base_record(digest: str) -> str:
    """The text of the file that says which base an adapter was made around."""
    return json_text({"digest": digest})


def minus(tensor: Tensor, around: Tensor) -> Tensor:
    """A difference in fp32 or better."""
    kind = torch.promote_types(torch.promote_types(tensor.dtype, around.dtype), torch.float32)
    return tensor.to(kind) - around


def square(tensor: Tensor, around: Tensor | None = None) -> float:
    """Squared Frobenius norm of a tensor, or of its difference from another, in fp64.

    `vector_norm` in fp32 adds up in one long sum, and of 2^27 numbers loses 3 % of it. In chunks,
    because a copy of a whole tensor would be most of the memory.
    """
    total = 0.0
    chunks = tensor.reshape(-1).split(_CHUNK)
    others = around.reshape(-1).split(_CHUNK) if around is not None else [None] * len(chunks)
    for chunk, other in zip(chunks, others, strict=True):
        wide = chunk.double() if other is None else chunk.double() - other
        total += float(wide.dot(wide))
    return total
