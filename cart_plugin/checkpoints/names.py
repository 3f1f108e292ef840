"""A checkpoint's tensors and the model's: transformers renames and fuses some on loading.

Adapters need the names of the model's modules, other tools those of the checkpoint. The base keeps
the checkpoint's names, and all arithmetic is done on the model's tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cart_plugin.errors import CartError

_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


@dataclass(eq=False)
class Unit:
    """Tensors of a checkpoint that become tensors of the model together; mostly one and one.

    Attributes:
        sources: names in the checkpoint.
        targets: names in the model's state dict; none where the model has no use for the tensor.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    _model: Any = field(repr=False, default=None)
    _converter: Any = field(repr=False, default=None)
    _patterns: tuple[str, ...] = field(repr=False, default=())

    @property
    def is_converted(self) -> bool:
        """Whether more than the name changes."""
        return self._converter is not None

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from the checkpoint's."""
        if not self.is_converted:
            return dict.fromkeys(self.targets, tensors[self.sources[0]])
        converter = copy.deepcopy(self._converter)
        for source, pattern in zip(self.sources, self._patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, tensors[source])
        found = converter.convert(self.targets[0], model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in found.items()
        }

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors from the model's."""
        if not self.is_converted:
            return {self.sources[0]: tensors[self.targets[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        found = revert_weight_conversion(self._model, dict(tensors))
        return {name: value.contiguous() for name, value in found.items()}


def model_class(config: Mapping[str, Any], label: str) -> Any:
    """The class that a config.json names.

    Raises:
        CartError: it names none, or one that transformers does not have.
    """
    import transformers

    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise CartError(
            f"model {label}: config.json does not name one architecture; add it, for example "
            '"architectures": ["LlamaForCausalLM"]'
        )
    found = getattr(transformers, named[0], None)
    if found is None:
        raise CartError(
            f"model {label}: transformers {transformers.__version__} has no {named[0]}; models "
            "that bring their own code are not supported"
        )
    return found


def settings(folder: Path, label: str) -> Any:
    """The config of a model's folder as transformers reads it, with all defaults.

    Raises:
        CartError: transformers cannot.
    """
    from transformers import AutoConfig

    try:
        # Never asks whether to run the model's code: it does not.
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise CartError(f"model {label}: transformers cannot read its config: {first}") from error


def meta_model(folder: Path, config: Mapping[str, Any], label: str) -> Any:
    """The model of a folder without its values.

    Args:
        folder: the model's.
        config: its config.json; a ``tie_word_embeddings`` of false goes before the file's.
        label: what errors call it.

    Raises:
        CartError: as `model_class` and `settings`, or transformers cannot build it.
    """
    kind = model_class(config, label)
    found = settings(folder, label)
    if config.get("tie_word_embeddings") is False:
        found.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            return kind(found)
    except Exception as error:
        raise CartError(f"model {label}: transformers cannot build it: {error}") from error


def units(model: Any, tensors: Mapping[str, tuple[int, ...]]) -> list[Unit]:
    """How the tensors of a checkpoint become those of a model, and back.

    Args:
        model: from `meta_model`.
        tensors: shapes by name in the checkpoint.

    Raises:
        CartError: a tensor has another shape than the model's, or there is no way back.
    """
    found = one_way(model, tensors)
    _check([unit for unit in found if unit.targets], tensors, model.state_dict())
    return found


def one_way(model: Any, tensors: Mapping[str, tuple[int, ...]]) -> list[Unit]:
    """The same as `units` without its checks: how the tensors become those of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    groups: dict[str, list[tuple[str, str | None]]] = {}
    unused = []
    for source in sorted(tensors, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if target not in state and source in state:
            target, pattern = rename_source_key(source, [], [], prefix, state)
        if target in state:
            groups.setdefault(target, []).append((source, pattern))
        else:
            unused.append(Unit((source,), ()))
    # What `revert_weight_conversion` goes by: as of a loaded model, what these tensors needed. Of
    # old names that none of them has the way back would be to others than theirs.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    found = []
    for target, members in groups.items():
        sources = tuple(source for source, _ in members)
        pattern = members[0][1]
        if pattern is None:
            found.append(Unit(sources[:1], (target,)))
            unused += [Unit((source,), ()) for source in sources[1:]]
            continue
        patterns = tuple(pattern for _, pattern in members if pattern is not None)
        unit = Unit(sources, (target,), model, by_pattern[pattern], patterns)
        empty = {source: torch.empty(tensors[source], device="meta") for source in sources}
        unit.targets = (target, *(name for name in unit.to_model(empty) if name != target))
        found.append(unit)
    return [*found, *unused]


def plain_sources(model: Any, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names in a checkpoint of those of the model's tensors that it holds as they are.

    Args:
        model: from `meta_model`, or loaded.
        tensors: shapes by name in the checkpoint.
    """
    return {
        unit.targets[0]: unit.sources[0]
        for unit in one_way(model, tensors)
        if len(unit.targets) == len(unit.sources) == 1 and not unit.is_converted
    }


def _check(
    found: Iterable[Unit], tensors: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]
) -> None:
    for unit in found:
        empty = {source: torch.empty(tensors[source], device="meta") for source in unit.sources}
        there = unit.to_model(empty)
        for name, tensor in there.items():
            if name not in state or tensor.shape != state[name].shape:
                wanted = tuple(state[name].shape) if name in state else "absent"
                raise CartError(
                    f"tensor {unit.sources[0]!r} is {tuple(tensor.shape)} but {wanted} in the "
                    "model that config.json describes; correct config.json"
                )
        back = unit.to_checkpoint(there)
        if {name: tuple(tensor.shape) for name, tensor in back.items()} != {
            source: tensors[source] for source in unit.sources
        }:
            raise CartError(
                f"transformers loads {unit.sources[0]} in a way that it cannot undo; this "
                "architecture cannot be compressed"
            )


def of_any_layer(name: str) -> str:
    """The name with # in the place of each layer's number."""
    return _LAYER.sub("#", name)


def tied_names(model: Any) -> dict[str, list[str]]:
    """All names of those parameters that have several, by the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {same[0]: same for same in names.values() if len(same) > 1}


def vocabulary_names(model: Any) -> set[str]:
    """The tensors whose rows are tokens: embeddings and heads, under all of their names."""
    tables = set()
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):  # models of no text
            continue
        for kind in ("weight", "bias"):
            parameter = getattr(module, kind, None)
            if isinstance(parameter, Tensor):
                tables.add(id(parameter))
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in tables
    }
