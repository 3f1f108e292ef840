"""A recipe's models: what it names, found and read (headers only), or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, add_merge_options

from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor import schema
from cart_plugin.doctor.findings import Finding, Level
from cart_plugin.doctor.layout import groups, references, tokenizer_models
from cart_plugin.doctor.parameters import check_method
from cart_plugin.errors import CartError


class OrderedConfiguration(MergeConfiguration):
    """A recipe whose models come in its own order; mergekit's go through a set.

    Without a base model the first one gives config and tokenizer: it must be the same each time.
    """

    def referenced_models(self) -> list[ModelReference]:
        """The models, each once."""
        return list(references(self).values())


@dataclass(frozen=True)
class Inputs:
    """A recipe's models.

    Attributes:
        config: the recipe as mergekit reads it.
        checkpoints: headers by label.
    """

    config: OrderedConfiguration
    checkpoints: Mapping[str, Checkpoint]

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters' folders by label of those inputs that are a base and an adapter."""
        named = references(self.config)
        return {label: model.lora.path for label, model in named.items() if model.lora is not None}

    @property
    def donor(self) -> Checkpoint:
        """The model that gives config and side files: the base model, or else the first one."""
        first = self.config.base_model or next(iter(references(self.config).values()))
        return self.checkpoints[str(first)]

    @property
    def bytes(self) -> int:
        """Bytes of the largest model."""
        return max(
            sum(info.bytes for info in checkpoint.tensors.values())
            for checkpoint in self.checkpoints.values()
        )


def read_config(document: Mapping[str, Any]) -> OrderedConfiguration:
    """Read a recipe, and nothing of its models.

    Raises:
        CartError: it is no recipe for mergekit-yaml.
    """
    recipe = {key: value for key, value in document.items() if key != "name"}
    if schema.recipe_class(recipe) is not MergeConfiguration:
        raise CartError("the recipe is for mergekit-pytorch (weight files); name model folders")
    config, findings = schema.parse(recipe, MergeConfiguration)
    stop_at(findings)
    if config is None:
        raise CartError("mergekit rejects the recipe")
    stop_at(check_method(config.merge_method)[1])
    stop_at(schema.check_dtypes(config))
    return OrderedConfiguration.model_validate(recipe)


def read_inputs(document: Mapping[str, Any]) -> Inputs:
    """Read a recipe and the headers of its models.

    Raises:
        CartError: it is no recipe for mergekit-yaml, or a model cannot be read.
    """
    ordered = read_config(document)
    for group in groups(ordered):
        twice = sorted({label for label in group.models if group.models.count(label) > 1})
        if twice:
            raise CartError(
                f"{group.label} names {twice[0]} twice, and it would count once; delete one: "
                "`weight` makes a model count more"
            )
    found: dict[str, Checkpoint] = {}
    for label, model in references(ordered).items():
        checkpoint, findings = files.read_folder(label, _located(model.model, "model"))
        stop_at([*findings, *files.check_dtypes(checkpoint)])
        if model.lora is not None:
            _located(model.lora, "adapter")
            stop_at(files.check_adapter(model.lora.path))
        found[label] = checkpoint
    if not found:
        raise CartError("the recipe names no model")
    return Inputs(ordered, found)


def _located(part: ModelPath, kind: str) -> Path:
    """The folder of a model or an adapter.

    Raises:
        CartError: it is none here.
    """
    path, findings = files.locate(part.path, kind)
    stop_at(findings)
    if path is None:
        raise CartError(
            f"{kind} {part} is not a local folder; download it "
            f"(`{files.to_folder(part.path, part.revision)}`) and write FOLDER in the recipe"
        )
    return path


def stop_at(findings: Iterable[Finding]) -> None:
    """Refuse to go on with a problem.

    Raises:
        CartError: there is one.
    """
    for finding in findings:
        if finding.level is Level.PROBLEM:
            raise CartError(f"{finding.fact}; {finding.advice}" if finding.advice else finding.fact)


_REFERENCES = ("model", "base_model", "source", "tokenizer_source")  # keys of a recipe
_WORDS = ("union", "base")  # of a tokenizer's source
_NAMED = ("tokens", "modules")  # what these hold is by name, whatever that is: `source`, `model`


def plain(
    config: MergeConfiguration, rename: Callable[[ModelReference], ModelReference] | None = None
) -> dict[str, Any]:
    """A recipe as plain data, that mergekit reads as the same recipe.

    Args:
        config: the recipe.
        rename: gives another model for one of the recipe's.
    """
    named = references(config) | tokenizer_models(config)

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(one) for one in node]  # `entry` here breaks Python 3.12.1
        if not isinstance(node, dict):
            return node
        return {key: entry(key, value) for key, value in node.items()}

    def entry(key: str, value: Any) -> Any:
        if key == "parameters":
            return value
        if key in _NAMED and isinstance(value, dict):
            return {name: walk(held) for name, held in value.items()}
        # A token's source may be a token of a model (`kind: model_token`), which is no model.
        if key in _REFERENCES and not (isinstance(value, dict) and "kind" in value):
            return model(value)
        return walk(value)

    def model(value: Any) -> Any:
        if value in _WORDS or not isinstance(value, str | dict | ModelReference):
            return value
        # As written: a path with a plus is one label and no reference.
        label = value if isinstance(value, str) else str(ModelReference.model_validate(value))
        found = named.get(label)
        if found is None:
            return value
        return written(found if rename is None else rename(found))

    # Not as JSON: mergekit 0.1.5 gives references with a space in their path as objects, and that
    # mode fails on them.
    found: dict[str, Any] = walk(config.model_dump(exclude_defaults=True))
    return found


def written(model: ModelReference) -> str | dict[str, Any]:
    """A model as a recipe names it: in its parts where one line would name another one."""
    line = str(model)
    try:
        if line not in _WORDS and ModelReference.model_validate(line) == model:
            return line
    except RuntimeError:  # of several `+` or `@` mergekit makes nothing
        pass
    parts: dict[str, Any] = {"model": {"path": model.model.path}}
    if model.model.revision is not None:
        parts["model"]["revision"] = model.model.revision
    if model.lora is not None:
        parts["lora"] = {"path": model.lora.path}
        if model.lora.revision is not None:
            parts["lora"]["revision"] = model.lora.revision
    if model.override_architecture is not None:
        parts["override_architecture"] = model.override_architecture
    return parts


def merge_options(arguments: Iterable[str]) -> MergeOptions:
    """Mergekit's options as its command line reads them.

    Raises:
        CartError: it does not take one of them.
    """

    @click.command()
    @add_merge_options
    def command(merge_options: MergeOptions) -> MergeOptions:
        return merge_options

    try:
        options: MergeOptions = command.main(list(arguments), standalone_mode=False)
    except click.ClickException as error:
        raise CartError(f"mergekit's options: {error.format_message()}") from None
    return options
