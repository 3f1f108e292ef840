"""The structure of a mergekit recipe: where it names models and where it sets parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputSliceDefinition,
    MergeConfiguration,
    ParameterSetting,
)
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from mergekit.tokenizer.config import ModelTokenEmbedding

from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.findings import Finding, problem

# What configs call the number of layers, of one side or both.
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"),
    *("num_decoder_layers", "encoder_layers", "decoder_layers"),
)

Recipe: TypeAlias = MergeConfiguration | RawPyTorchMergeConfig


@dataclass(frozen=True)
class Group:
    """Models that are merged with each other.

    Attributes:
        label: the list's path in the recipe, such as `slices[0].sources`.
        entries: its entries, as mergekit's configuration classes.
        base: the base model's label, if there is one.
    """

    label: str
    entries: tuple[Any, ...]
    base: str | None

    @property
    def models(self) -> list[str]:
        """The labels of the entries' models."""
        return [str(entry.model) for entry in self.entries]


@dataclass(frozen=True)
class Place:
    """Where a recipe may set parameters.

    Attributes:
        label: its path in the recipe, such as `models[1]`; empty at the top.
        settings: the parameters set there.
        model: whose parameters they are, or None where they hold for all models.
        is_base: the model is the base model of its merge.
    """

    label: str
    settings: Mapping[str, ParameterSetting]
    model: str | None = None
    is_base: bool = False

    def name(self, parameter: str) -> str:
        """The path of one parameter set here."""
        return f"{self.label}.parameters.{parameter}".lstrip(".")


def groups(config: Recipe) -> list[Group]:
    """The groups of models that a recipe merges."""
    base = None if config.base_model is None else str(config.base_model)
    if isinstance(config, RawPyTorchMergeConfig):
        return [Group("models", tuple(config.models), base)]
    found = []
    for label, part in _parts(config):
        if part.models:
            found.append(Group(f"{label}models", tuple(part.models), base))
        for number, piece in enumerate(part.slices or ()):
            own = base if piece.base_model is None else str(piece.base_model)
            found.append(Group(f"{label}slices[{number}].sources", tuple(piece.sources), own))
    return found


def places(config: Recipe) -> Iterator[Place]:
    """All places of a recipe that set parameters: those for all models first."""
    yield Place("", config.parameters or {})
    if isinstance(config, MergeConfiguration):
        for label, part in _parts(config):
            if part is not config:
                yield Place(label.rstrip("."), part.parameters or {})
            for number, piece in enumerate(part.slices or ()):
                yield Place(f"{label}slices[{number}]", piece.parameters or {})
    for group in groups(config):
        for number, entry in enumerate(group.entries):
            model = str(entry.model)
            label = f"{group.label}[{number}]"
            yield Place(label, entry.parameters or {}, model, model == group.base)


def references(config: Recipe) -> dict[str, ModelReference]:
    """The models of a recipe by label, in its order, base models last."""
    models: list[Any] = [entry.model for group in groups(config) for entry in group.entries]
    if isinstance(config, MergeConfiguration):
        pieces = [piece for _, part in _parts(config) for piece in part.slices or ()]
        models += [piece.base_model for piece in pieces if piece.base_model is not None]
    models += [config.base_model] if config.base_model is not None else []
    return {
        # mergekit-pytorch takes paths as they are, not as `model+lora@revision`.
        str(model): ModelReference.model_validate({"model": {"path": model}})
        if isinstance(model, str)
        else model
        for model in models
    }


def tokenizer_models(config: Recipe) -> dict[str, ModelReference]:
    """The models that give the tokenizer, or a token's row, by label: maybe none that is merged."""
    if not isinstance(config, MergeConfiguration):
        return {}
    tokenizer = config.tokenizer
    named: list[Any] = [config.tokenizer_source]
    if tokenizer is not None:
        rows = [entry.source for entry in (tokenizer.tokens or {}).values()]
        named += [tokenizer.source]
        named += [row.model if isinstance(row, ModelTokenEmbedding) else row for row in rows]
    return {str(model): model for model in named if isinstance(model, ModelReference)}


def check_ranges(config: Recipe, checkpoints: Mapping[str, Checkpoint]) -> list[Finding]:
    """Find layer ranges that name no layer, or layers that a model does not have."""
    findings = []
    for group in groups(config):
        for number, entry in enumerate(group.entries):
            if not isinstance(entry, InputSliceDefinition):
                continue
            first, end = entry.layer_range
            layers = _layers(checkpoints[str(entry.model)].config)
            where = f"{group.label}[{number}].layer_range [{first}, {end}]"
            if not 0 <= first < end:
                findings.append(
                    problem(f"{where} names no layer", "write [FIRST, LAST + 1], counted from 0")
                )
            elif layers is not None and end > layers:
                findings.append(
                    problem(
                        f"{where} goes beyond model {entry.model}, which has {layers} layers",
                        f"let it end at {layers} or before: the end does not count",
                    )
                )
    return findings


def _layers(config: Mapping[str, Any]) -> int | None:
    """The most layers of any part of a model, by its config."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    counts = [part[key] for part in parts for key in _LAYERS if isinstance(part.get(key), int)]
    return max(counts, default=None)


def conditions(setting: ParameterSetting) -> list[ConditionalParameter]:
    """The filtered entries of a setting."""
    entries = setting if isinstance(setting, list) else [setting]
    return [entry for entry in entries if isinstance(entry, ConditionalParameter)]


def scalars(setting: ParameterSetting) -> Iterator[Any]:
    """The values of a setting: through its filters and along its gradients."""
    if isinstance(setting, ConditionalParameter):
        yield from scalars(setting.value)
    elif isinstance(setting, list):
        for entry in setting:
            yield from scalars(entry)
    else:
        yield setting


def _parts(config: MergeConfiguration) -> Iterable[tuple[str, Any]]:
    """What holds `models` or `slices`, with its label: the recipe itself and its modules."""
    yield "", config
    for name, module in (config.modules or {}).items():
        yield f"modules.{name}.", module
