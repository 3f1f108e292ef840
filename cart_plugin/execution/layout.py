"""The inputs' tensors under the model's own names.

Files name and stack tensors differently: as published, or as transformers' model has them. Merged
under the model's names, the same weights give the same values however they were saved.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.placement import is_computed, without_place
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution.inputs import Inputs
from cart_plugin.wording import count, some


@dataclass(frozen=True)
class Placed:
    """A checkpoint's tensors as the model has them.

    Attributes:
        checkpoint: where they are from.
        units: what each of the model's tensors is made of, by name; tensors that the model has no
            use for stand there under their own names.
        shapes: of the floating-point ones, by name.
        unused: the names that the model has no use for.
        computed: those of them that are masks or tables, and no weights.
        tied: the names that have no tensor of their own, with that whose values they share.
    """

    checkpoint: Checkpoint
    units: dict[str, names.Unit] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)
    tied: dict[str, str] = field(default_factory=dict)

    def is_floating(self, name: str) -> bool:
        """Whether a tensor is made of floating-point ones."""
        return all(self.checkpoint.tensors[part].is_floating for part in self.units[name].sources)


def donor_model(inputs: Inputs) -> Any:
    """The model of the inputs' config, without values.

    Raises:
        CartError: transformers does not have it, or cannot build it.
    """
    return names.meta_model(inputs.donor.path, inputs.donor.config, inputs.donor.name)


def place(model: Any, checkpoint: Checkpoint) -> Placed:
    """Find the model's tensors in a checkpoint.

    Raises:
        CartError: its tensors are not those of the model.
    """
    held = checkpoint.tensors
    placed = Placed(checkpoint)
    try:
        found = names.one_way(model, {name: info.shape for name, info in held.items()})
        for unit in found:
            if not unit.targets:
                (source,) = unit.sources
                unit.targets = unit.sources
                placed.unused.add(source)
                if is_computed(source, held[source]):
                    placed.computed.add(source)
            shapes = _shapes(unit, held)
            placed.units.update(dict.fromkeys(unit.targets, unit))
            if placed.is_floating(unit.targets[0]):
                placed.shapes.update(shapes)
        _add_tied(model, placed)
    except CartError:
        raise
    except Exception as error:  # transformers' conversions, on tensors that are not as they expect
        raise CartError(
            f"model {checkpoint.name}: its tensors are not those of {type(model).__name__}: "
            f"{first_line(error)}"
        ) from None
    return placed


def _add_tied(model: Any, placed: Placed) -> None:
    """Add the names that a file may leave out: some programs store a tied head, others do not."""
    state = model.state_dict().keys()
    _add_names(names.tied_names(model), placed)
    if not names.vocabulary_names(model).isdisjoint(state - placed.units.keys()):
        # This model may be tied where the others, and so the class as they configure it, are not.
        checkpoint = placed.checkpoint
        with contextlib.suppress(CartError):
            own = names.meta_model(checkpoint.path, checkpoint.config, checkpoint.name)
            _add_names(names.tied_names(own), placed)


def _add_names(tied: Mapping[str, list[str]], placed: Placed) -> None:
    for same in tied.values():
        held = next((name for name in same if name in placed.units), None)
        if held is None or placed.units[held].is_converted:
            continue
        for name in same:
            if name not in placed.units:
                placed.units[name] = names.Unit(placed.units[held].sources, (name,))
                placed.tied[name] = held


def _shapes(unit: names.Unit, held: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    if not unit.is_converted:
        return dict.fromkeys(unit.targets, held[unit.sources[0]].shape)
    empty = {source: torch.empty(held[source].shape, device="meta") for source in unit.sources}
    return {name: tuple(tensor.shape) for name, tensor in unit.to_model(empty).items()}


_LAYER = re.compile(r"\.\d+\.")


def check_alike(placed: Mapping[str, Placed], inputs: Inputs) -> None:
    """Refuse to merge, tensor by tensor, models that differ: what to do would be a guess.

    Raises:
        CartError: they are of different architectures, or one lacks weights of another, or has
            them in another shape.
    """
    first, *others = placed.values()
    shared = set.intersection(*(set(held.units) for held in placed.values()))
    used, *rest = [_kept(held, shared) for held in placed.values()]
    own = _architecture(inputs, first)
    for other, theirs in zip(others, rest, strict=True):
        if _architecture(inputs, other) != own:
            raise CartError(
                f"model {first.checkpoint.name} is a {own}, model {other.checkpoint.name} a "
                f"{_architecture(inputs, other)}"
            )
        for left, right, names_of in ((first, other, used), (other, first, theirs)):
            lacking = sorted(names_of.keys() - right.units.keys())
            if lacking:
                raise CartError(
                    "the models do not hold the same tensors: model "
                    f"{right.checkpoint.name} lacks {count(len(lacking), 'tensor')} of model "
                    f"{left.checkpoint.name} ({some(lacking)})"
                )
        for name, shape in used.items():
            if theirs.get(name, shape) != shape:
                raise CartError(
                    f"the models do not hold the same tensors: {name} is {shape} in model "
                    f"{first.checkpoint.name} and {theirs[name]} in model {other.checkpoint.name}"
                )


def _architecture(inputs: Inputs, placed: Placed) -> str:
    config = inputs.checkpoints[placed.checkpoint.name].config
    return str((config.get("architectures") or ["?"])[0])


def _kept(placed: Placed, shared: set[str]) -> dict[str, tuple[int, ...]]:
    """The weights that have to be in all models, or are."""
    outside = {*placed.computed, *_left_out(placed, shared)}
    return {name: shape for name, shape in placed.shapes.items() if name not in outside}


def left_out(placed: Mapping[str, Placed]) -> list[str]:
    """Weights that are not merged: the models' classes have no place for them, and some lack them.

    Such are the heads of `bert-base-uncased`, in a class that has others.
    """
    shared = set.intersection(*(set(held.units) for held in placed.values()))
    return sorted({name for held in placed.values() for name in _left_out(held, shared)})


def _left_out(placed: Placed, shared: set[str]) -> list[str]:
    # By its own config: a layer more, as that of another size has it, is no tensor without a place.
    found = placed.unused - placed.computed - shared
    return without_place(placed.checkpoint, sorted(found))


def check_described(model: Any, placed: Placed) -> None:
    """Refuse weights that are not of the config's model, before the work.

    Raises:
        CartError: a tensor has another shape than its config describes, or is missing.
    """
    state, tables = model.state_dict(), names.vocabulary_names(model)
    for name, shape in placed.shapes.items():
        # Rows for more or fewer tokens are corrected when all is done.
        if name in state and name not in tables and tuple(state[name].shape) != shape:
            raise CartError(
                f"model {placed.checkpoint.name} is not what its config describes: {name} is "
                f"{shape} and should be {tuple(state[name].shape)}"
            )
    if lacking := sorted(missing(model, placed, known=placed)):
        raise CartError(
            f"model {placed.checkpoint.name} is not what its config describes: it lacks "
            f"{count(len(lacking), 'tensor')} that it has in other layers ({some(lacking)})"
        )


def missing(model: Any, placed: Placed, known: Placed) -> set[str]:
    """What a checkpoint does not give the model, under no name.

    Args:
        model: without values.
        placed: the checkpoint.
        known: an input of the merge: what it holds in no layer, files of this model do not hold.
    """
    found: set[str] = set(model.state_dict().keys() - placed.units.keys())
    for same in names.tied_names(model).values():
        if not found.issuperset(same):
            found -= set(same)
    held = {_LAYER.sub(".N.", name) for name in known.units}
    own = model.state_dict().keys() - known.units.keys()
    never = {_LAYER.sub(".N.", name) for name in own} - held
    return {name for name in found if _LAYER.sub(".N.", name) not in never}
