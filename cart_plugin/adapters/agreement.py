"""What has to be alike in adapters that are merged, and what is said of what is not."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from cart_plugin.adapters import kinds, selection
from cart_plugin.adapters.inputs import Adapter, Shape, is_buffer
from cart_plugin.errors import CartError
from cart_plugin.wording import count, some

_BASE = "base_model_name_or_path"
_BASES_TABLE = ".base_layer.weight"
_WHOLE_MODELS = (
    "merge each into its base (PEFT's merge_and_unload, then save_pretrained) and the whole models "
    "with `mergekit-cart merge`"
)

_OTHERS = {
    "embedding": "tables of tokens",
    "convolution": "convolutions",
    "experts": "parameters such as those of stacked experts",
}
# Of these kinds PEFT knows no bias of B, and refuses lora_bias for the whole adapter.
_WITHOUT_BIAS = {"experts": "target_parameters", "embedding": "LoRA of embeddings"}


@dataclass
class Plan:
    """What is merged.

    Attributes:
        adapters: in order of their names, so that the order in which they are given does not
            matter.
        shapes: of the weights that any of them changes, by PEFT's names of modules, in order.
        whole: names of tensors that take the place of the base's, in the merged adapter, by what
            adapters call them (`Adapter.whole`).
        tables: those of them that are the base's own, beside its LoRA.
        common: keys and values of the merged adapter's config that are theirs.
        notes: what a user has to know.
    """

    adapters: list[Adapter]
    shapes: dict[str, Shape]
    whole: dict[str, str]
    tables: list[str]
    common: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def has_bias(self) -> bool:
        """Whether any adapter has biases of its own in B."""
        return any(
            layer.factors.bias is not None
            for adapter in self.adapters
            for layer in adapter.layers.values()
        )

    def holders(self, key: str) -> list[Adapter]:
        """The adapters that hold a tensor in the place of the base's."""
        return [adapter for adapter in self.adapters if key in adapter.whole]

    def dtype(self, names: Callable[[Adapter], Iterable[str]]) -> torch.dtype:
        """The dtype to which tensors of all adapters promote."""
        found = None
        for adapter in self.adapters:
            for name in names(adapter):
                own = adapter.checkpoint.dtype(name)
                found = own if found is None else torch.promote_types(found, own)
        assert found is not None
        return found


def agree(adapters: Sequence[Adapter], base: str | None) -> Plan:
    """Compare adapters with each other.

    Args:
        adapters: one or more.
        base: the name of their base, if it is given.

    Raises:
        CartError: they are of different bases or shapes, or hold what cannot be merged without the
            base.
    """
    ordered = sorted(adapters, key=lambda adapter: adapter.name)
    common = _common(ordered, base)
    shapes: dict[str, Shape] = {}
    for adapter in ordered:
        for module, layer in adapter.layers.items():
            known = shapes.setdefault(module, layer.shape)
            if known != layer.shape:
                other = next(one for one in ordered if module in one.layers)
                raise CartError(
                    f"adapters {other.name} and {adapter.name} are of different models: {module} "
                    f"is {known} in the one and {layer.shape} in the other; merge adapters of one "
                    "base"
                )
    _check_names(ordered)
    plan = Plan(ordered, dict(sorted(shapes.items())), *_whole(ordered), common)
    for module, shape in plan.shapes.items():
        if plan.has_bias and shape.kind in _WITHOUT_BIAS:
            raise CartError(
                f"some adapters have biases (lora_bias) and some {_WITHOUT_BIAS[shape.kind]} "
                f"({module}), and PEFT holds no adapter with both; if the base's layers have "
                f"biases, {_WHOLE_MODELS}"
            )
    plan.notes += _notes(plan)
    return plan


_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS = re.compile(r"\.experts(\.(gate_up_proj|down_proj|base_layer))*$")


def _check_names(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that call the same modules differently, such as with and without a head."""
    singles, stacks = (
        [(adapter, module) for adapter in adapters for module in adapter.layers if test(module)]
        for test in (_EXPERT.search, _EXPERTS.search)
    )
    if singles and stacks:
        (first, single), (other, stack) = singles[0], stacks[0]
        raise CartError(
            f"adapter {first.name} has experts one by one ({single}) and {other.name} has them "
            f"stacked ({stack}), as releases of transformers before 5 and from 5 on do; "
            f"{_WHOLE_MODELS}"
        )
    by_stack = [(adapter, _stacks(adapter)) for adapter in adapters]
    for (first, ours), (other, theirs) in itertools.combinations(by_stack, 2):
        # Stacks that both know by one name are called alike, whatever of them each changes.
        apart = not ours.keys() & theirs.keys()
        known: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for module in chain.from_iterable(ours[stack] for stack in ours if stack not in theirs):
            way, rest = _split(module)
            known.setdefault(rest, []).append((way, module))
        for module in chain.from_iterable(theirs[stack] for stack in theirs if stack not in ours):
            way, rest = _split(module)
            for before, found in known.get(rest, ()):
                is_longer = f".{module}".endswith(f".{found}") or f".{found}".endswith(f".{module}")
                # Text and images of one model may have such names, but hardly the same widths.
                same = other.layers[module].shape == first.layers[found].shape
                if (is_longer and apart) or (same and (is_longer or _is_one_way(before, way))):
                    raise CartError(
                        f"adapters {first.name} and {other.name} call one module differently "
                        f"({found} and {module}): they were trained on different classes of the "
                        "base, such as with and without its head, or with releases of "
                        "transformers that name its parts differently; train or convert them to "
                        "one"
                    )


def _split(module: str) -> tuple[tuple[str, ...], str]:
    """The parts of a name on the way to the stack of layers (or to the last part), and the rest."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    start = max(number - 1, 0)
    return tuple(parts[:start]), ".".join(parts[start:])


def _stacks(adapter: Adapter) -> dict[tuple[str, ...], list[str]]:
    """The modules of each stack of layers, by its name; what is in none is one by itself."""
    found: dict[tuple[str, ...], list[str]] = {}
    for module in adapter.layers:
        way, rest = _split(module)
        found.setdefault((*way, rest.partition(".")[0]), []).append(module)
    return found


def _is_one_way(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two ways may lead to one stack: with parts between, or in another order.

    An encoder beside a decoder that holds an encoder of its own has another first part.
    """
    before, after = frozenset(one), frozenset(other)
    is_within = before <= after or after <= before
    return before == after or (is_within and one[:1] == other[:1])


def _whole(adapters: Sequence[Adapter]) -> tuple[dict[str, str], list[str]]:
    """The tensors that take the place of the base's, of the same names and shapes in all.

    And which of them are tables of the base's own, the same wherever they are.

    PEFT saves the base's own table beside LoRA of it: that may be lacking where there is none. The
    bias of a module with LoRA has such a name, too, and is trained.
    """
    found, tables = {}, []
    for key in sorted(set().union(*(adapter.whole for adapter in adapters))):
        holders = [adapter for adapter in adapters if key in adapter.whole]
        first = holders[0]
        # With LoRA wherever any of them has it.
        name = found[key] = max((adapter.whole[key] for adapter in holders), key=len)
        if name.endswith(_BASES_TABLE) and _are_one(key, holders):
            tables.append(key)
            continue
        for adapter in adapters:
            if adapter not in holders:
                raise CartError(
                    f"adapter {first.name} holds {name} whole (modules_to_save, trained biases, "
                    f"resized embeddings) and {adapter.name} does not, or by another name: what "
                    f"that has there is the base's, which is not read here; {_WHOLE_MODELS}"
                )
            one, other = first.held(key).shape, adapter.held(key).shape
            if one != other:
                raise CartError(
                    f"{name} is {one} in adapter {first.name} and {other} in {adapter.name}: heads "
                    "or vocabularies of different sizes cannot be merged"
                )
    return found, tables


def _are_one(key: str, holders: Sequence[Adapter]) -> bool:
    first = holders[0]
    return all(
        other.held(key).shape == first.held(key).shape
        and torch.equal(other.read(other.whole[key]), first.read(first.whole[key]))
        for other in holders[1:]
    )


def _common(adapters: Sequence[Adapter], base: str | None) -> dict[str, Any]:
    """What the merged adapter's config takes over."""
    configs = {adapter.name: adapter.checkpoint.config for adapter in adapters}
    found: dict[str, Any] = {}
    found[_BASE] = _agreed_base(configs) if base is None else base
    if base is None:
        found["revision"] = _agreed_revision(configs)
    found["task_type"] = _agreed(
        configs, "task_type", "correct adapter_config.json if they are of one class of models"
    )
    # Of classes without a task type: PEFT's automatic classes load them by it.
    classes = [config.get("auto_mapping") for config in configs.values()]
    found["auto_mapping"] = classes[0] if all(one == classes[0] for one in classes) else None
    found["bias"] = _agreed(configs, "bias", _WHOLE_MODELS) or "none"
    parameters = {
        name: {"target_parameters": sorted(config.get("target_parameters") or ())}
        for name, config in configs.items()
    }
    # PEFT does not name these in the file: of different ones nobody knows which is which.
    found["target_parameters"] = _agreed(parameters, "target_parameters", _WHOLE_MODELS)
    saved = [name for config in configs.values() for name in config.get("modules_to_save") or ()]
    found["modules_to_save"] = sorted(set(saved)) or None
    # PEFT corrects it where a module is of the other kind, but takes it beside no parameters.
    turned = any(config.get("fan_in_fan_out") for config in configs.values())
    found["fan_in_fan_out"] = turned and not found["target_parameters"]
    found.update(selection.selection(adapters))
    return found


def _agreed(configs: Mapping[str, Mapping[str, Any]], key: str, advice: str) -> Any:
    """The one value of a key; those that do not have it agree with all."""
    values = [(name, config[key]) for name, config in configs.items() if config.get(key)]
    for name, value in values[1:]:
        if value != values[0][1]:
            raise CartError(
                f"adapters {values[0][0]} and {name} differ in {key} of adapter_config.json "
                f"({values[0][1]} and {value}); {advice}"
            )
    return values[0][1] if values else None


def _agreed_revision(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The one revision of the base; an adapter that names a base and no revision has its main."""
    said = {
        name: {"revision": config.get("revision") or "main"}
        for name, config in configs.items()
        if config.get(_BASE) or config.get("revision")
    }
    _agreed(said, "revision", "pass --base to say that they are one")
    return next((config["revision"] for config in configs.values() if config.get("revision")), None)


def _agreed_base(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    values: dict[str, tuple[str, str]] = {}
    for name, config in configs.items():
        if config.get(_BASE):
            path = str(config[_BASE])
            place = os.path.realpath(path) if os.path.exists(path) else path.rstrip("/")
            values.setdefault(place, (path, name))
    if len(values) > 1:
        (first, one), (second, other) = list(values.values())[:2]
        raise CartError(
            f"adapters {one} and {other} are of different bases: {first} and {second}; if these "
            "are one model, pass its name as --base"
        )
    return next((path for path, _ in values.values()), None)


def lacking_notes(plan: Plan) -> Iterator[str]:
    """Says which adapters do not change all that others do."""
    for adapter in plan.adapters:
        lacking = [module for module in plan.shapes if module not in adapter.layers]
        if lacking:
            yield (
                f"{adapter.name} lacks {len(lacking):,} of {count(len(plan.shapes), 'module')}, "
                f"such as {lacking[0]}: a difference of zero there"
            )


def _apart_notes(plan: Plan) -> Iterator[str]:
    """Says once of adapters that have no module in common: perhaps they only call it otherwise."""
    for one, other in itertools.combinations(plan.adapters, 2):
        apart = one.layers and other.layers and not one.layers.keys() & other.layers.keys()
        # A third that has modules of both calls all of them alike.
        if apart and not any(
            one.layers.keys() & third.layers.keys() and other.layers.keys() & third.layers.keys()
            for third in plan.adapters
        ):
            yield (
                f"{one.name} and {other.name} have no module in common, such as "
                f"{min(one.layers)} and {min(other.layers)}: if one was saved by another version "
                "of transformers, which calls the same modules otherwise, the merged adapter does "
                "not load or does half of its work; train or save both by one version"
            )
            return


def _notes(plan: Plan) -> Iterator[str]:
    for adapter in plan.adapters:
        if note := kinds.newer_note(adapter.name, adapter.checkpoint.config):
            yield note
    yield from _apart_notes(plan)
    yield from selection.notes(plan.adapters)
    yield from lacking_notes(plan)
    averaged = [
        name
        for key, name in plan.whole.items()
        if key not in plan.tables and not is_buffer(plan.holders(key)[0].held(key))
    ]
    if averaged and len(plan.adapters) > 1:
        yield (
            f"averaged is what the adapters hold whole ({some(averaged)}): whatever the method, "
            "the base's values are not known here. PEFT loads such tensors; vLLM, llama.cpp and "
            "SGLang do not"
        )
    if plan.tables:
        yield (
            f"the base's own {plan.tables[0]} is kept, which PEFT has saved beside its LoRA "
            "(save_embedding_layers=False saves none)"
        )
    others = [module for module, shape in plan.shapes.items() if shape.kind in _OTHERS]
    if others:
        what = sorted({_OTHERS[plan.shapes[module].kind] for module in others})
        yield (
            f"{some(others)}: no linear layers but {' and '.join(what)}. PEFT loads their LoRA; "
            "vLLM, llama.cpp and SGLang refuse it, or have not been tried with it"
        )
    if plan.has_bias:
        yield (
            "the adapters' biases (lora_bias) are averaged; PEFT loads them, but merges them into "
            "the base only where its layers have biases, too; other servers do not load them"
        )
    if plan.common[_BASE] is None:
        yield "no adapter names its base; pass --base, or name it wherever the merge is loaded"
