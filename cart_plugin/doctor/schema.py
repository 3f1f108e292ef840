"""Checks of a recipe's form: mergekit's own configuration classes, and the keys they ignore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from mergekit.tokenizer.config import (
    ModelTokenEmbedding,
    TokenEmbeddingConfig,
    TokenizerConfig,
    ZeroEmbedding,
)
from pydantic import BaseModel, ValidationError

from cart_plugin.checkpoints.headers import WEIGHT_SUFFIXES
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.inputs import MAPPING
from cart_plugin.doctor.layout import Recipe
from cart_plugin.doctor.parameters import did_you_mean

# Under each class of mergekit's configuration, the keys whose values hold further classes, in lists
# or by names, and those whose values are such.
_MEMBERS: dict[type[BaseModel], dict[str, type[BaseModel]]] = {
    MergeConfiguration: {
        "models": InputModelDefinition,
        "slices": OutputSliceDefinition,
        "modules": OutputModuleDefinition,
    },
    OutputModuleDefinition: {"models": InputModelDefinition, "slices": OutputSliceDefinition},
    OutputSliceDefinition: {"sources": InputSliceDefinition},
    RawPyTorchMergeConfig: {"models": InputModelDefinition},
    TokenizerConfig: {"tokens": TokenEmbeddingConfig},
}
_PARTS: dict[type[BaseModel], dict[str, type[BaseModel]]] = {
    MergeConfiguration: {
        "base_model": ModelReference,
        "tokenizer_source": ModelReference,
        "tokenizer": TokenizerConfig,
    },
    OutputSliceDefinition: {"base_model": ModelReference},
    InputModelDefinition: {"model": ModelReference},
    InputSliceDefinition: {"model": ModelReference},
    TokenizerConfig: {"source": ModelReference},
    ModelTokenEmbedding: {"model": ModelReference},
    ModelReference: {"model": ModelPath, "lora": ModelPath},
}
# Keys of mergekit 0.1.5 that nothing in it reads.
_UNREAD: dict[type[BaseModel], str] = {OutputSliceDefinition: "residual_weight"}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def recipe_class(
    document: dict[str, Any],
) -> type[MergeConfiguration] | type[RawPyTorchMergeConfig]:
    """mergekit-pytorch's class for recipes whose models are weight files, else mergekit-yaml's."""
    entries = document.get("models")
    models = (
        [entry.get("model") for entry in entries or () if isinstance(entry, dict)]
        if (isinstance(entries, list))
        else []
    )
    for model in models:
        if isinstance(model, str) and model.endswith(WEIGHT_SUFFIXES) and not Path(model).is_dir():
            return RawPyTorchMergeConfig
    return MergeConfiguration


def parse(
    document: dict[str, Any], kind: type[MergeConfiguration] | type[RawPyTorchMergeConfig]
) -> tuple[Recipe | None, list[Finding]]:
    """Read a recipe with mergekit's own class; None and the reasons if that rejects it."""
    # `name` is mergekit-multi's, which takes it off before, too.
    rest = {key: value for key, value in document.items() if key != "name"}
    try:
        return kind.model_validate(rest), []
    except ValidationError as error:
        # A wrong setting fails every branch of a union: report each place once.
        places: dict[str, str] = {}
        for detail in error.errors():
            place = [str(step) for step in detail["loc"]]
            message = str(detail["msg"])
            if "parameters" in place:
                place = place[: place.index("parameters") + 2]
                message = "must be a value, a gradient [a, b, ...] or a list of filter and value"
            places.setdefault(".".join(place), message)
        return None, [
            problem(f"{place}: {message}", "correct it; mergekit's README describes recipes")
            for place, message in places.items()
            if place != "merge_method"  # has its own check
        ]
    except RuntimeError as error:  # mergekit's own validators
        advice = "correct it"
        if "Can't parse" in str(error) or "multiple @" in str(error):
            advice = (
                "`+` stands between a model and its adapter and `@` before a revision; a folder "
                f"with such a sign in its name is written as a mapping, {MAPPING.format('FOLDER')}"
            )
        return None, [problem(f"mergekit rejects the recipe: {error}", advice)]


def check_keys(
    document: dict[str, Any], kind: type[BaseModel], method_parameters: set[str]
) -> list[Finding]:
    """Find keys that mergekit would ignore in silence, at every level of a recipe."""
    top = {key: value for key, value in document.items() if key != "name"}
    return _check_keys(top, kind, "", method_parameters)


def _check_keys(
    node: Any, kind: type[BaseModel], label: str, method_parameters: set[str]
) -> list[Finding]:
    if not isinstance(node, dict):
        return []
    findings = []
    fields = set(kind.model_fields)
    for key, value in node.items():
        where = f"{label}.{key}".lstrip(".")
        members = _MEMBERS.get(kind, {}).get(key)
        part = _PARTS.get(kind, {}).get(key)
        if key not in fields:
            findings.append(_unknown_key(str(key), where, fields, method_parameters))
        elif members is not None:
            for step, entry in _entries(value):
                findings += _check_keys(entry, members, where + step, method_parameters)
        elif part is not None:
            findings += _check_keys(value, part, where, set())
        elif kind is TokenEmbeddingConfig and key == "source":
            findings += _check_token_source(value, where)
        elif key == _UNREAD.get(kind) and value is not None:
            fact = f"{where} is ignored: nothing in mergekit reads it"
            findings.append(problem(fact, "delete it"))
        elif key == "parameters" and isinstance(value, dict):
            for name, setting in value.items():
                findings += _check_condition_keys(setting, f"{where}.{name}")
    return findings


def _check_token_source(value: Any, where: str) -> list[Finding]:
    """Look at where a token's row comes from: what is no token of a model is taken for a model."""
    if not isinstance(value, dict):
        return []
    if value.get("kind") == "zero":
        return _check_keys(value, ZeroEmbedding, where, set())
    if value.keys().isdisjoint(("kind", "token", "token_id")):
        return _check_keys(value, ModelReference, where, set())
    findings = _check_keys(value, ModelTokenEmbedding, where, set())
    try:
        ModelTokenEmbedding.model_validate(value)
    except (ValidationError, RuntimeError):
        findings = findings or [
            problem(
                f"{where} is not a token of a model: mergekit takes it for the model alone, or "
                "refuses it",
                "write `kind: model_token`, `model:`, and one of `token:` and `token_id:`",
            )
        ]
    return findings


def _entries(value: Any) -> list[tuple[str, Any]]:
    """The members of a list or mapping, with the last step of their labels."""
    if isinstance(value, dict):
        return [(f".{key}", entry) for key, entry in value.items()]
    if isinstance(value, list):
        return [(f"[{number}]", entry) for number, entry in enumerate(value)]
    return []


def _check_condition_keys(setting: Any, where: str) -> list[Finding]:
    fields = set(ConditionalParameter.model_fields)
    return [
        _unknown_key(str(key), f"{where}[{number}].{key}", fields, set())
        for number, condition in enumerate(setting if isinstance(setting, list) else [setting])
        if isinstance(condition, dict)
        for key in condition
        if key not in fields
    ]


def _unknown_key(key: str, where: str, fields: set[str], method_parameters: set[str]) -> Finding:
    if key in method_parameters and "parameters" in fields:
        return problem(
            f"{where} is ignored: {key} is a parameter", "write it under `parameters:` there"
        )
    return problem(
        f"{where} is unknown and would be ignored",
        did_you_mean(key, fields) or f"known here: {', '.join(sorted(fields))}",
    )


def check_dtypes(config: Recipe) -> list[Finding]:
    """Check the names of dtypes, which mergekit reads only when the first tensor is due."""
    findings = []
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name is not None and name.removeprefix("torch.") not in _DTYPES:
            known = _SHORT_DTYPES.get(name)
            advice = f"did you mean {known}?" if known else did_you_mean(name, _DTYPES)
            findings.append(
                problem(
                    f"{key}: mergekit cannot merge in {name}",
                    advice or f"use one of {', '.join(_DTYPES)}",
                )
            )
    return findings
