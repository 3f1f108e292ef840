"""What becomes of each tensor: LoRA, a bias beside it, a module stored whole, or nothing.

Decided by what PEFT can hold: it must load the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from cart_plugin.compress.layers import Assignment, Layer, Structure, nested
from cart_plugin.errors import CartError
from cart_plugin.merging.tensors import is_decomposed


def assign(
    structure: Structure,
    changed: Collection[str],
    *,
    drop_small: bool,
    small_error: float,
    errors: Mapping[str, float],
    refused: Mapping[str, str],
    unsaved: Mapping[str, str],
    as_parameters: Collection[str],
) -> Assignment:
    """Decide what becomes of the tensors in which models differ from the base.

    Args:
        structure: the model's.
        changed: names, in the model's state dict, of the tensors in which models differ
            from the base.
        drop_small: leave all but LoRA layers as the base has them.
        small_error: leave those of them whose error is at most this, but for tensors of modules
            that another tensor has stored whole.
        errors: largest relative difference from the base, of the tensors for which it is known.
        refused: modules that PEFT's LoRA does not work for, and why.
        unsaved: modules that PEFT cannot store whole, and why.
        as_parameters: modules that get LoRA beside stacked experts only, and as these do.

    Raises:
        CartError: modules stored whole would leave nothing to LoRA.
    """
    found = Assignment()
    changed = [name for name in structure.state if name in changed and name in structure.stored]
    candidates = _candidates(structure, refused, as_parameters, changed, drop_small)
    biases = {
        f"{layer.module}.bias": name
        for name, layer in candidates.items()
        if not layer.is_parameter and f"{layer.module}.bias" in structure.state
    }
    experts = any(layer.is_parameter for name, layer in candidates.items() if name in changed)
    lora: dict[str, Layer] = {name: candidates[name] for name in changed if name in candidates}
    whole: dict[str, list[str]] = {}
    small = {name for name in changed if errors.get(name, math.inf) <= small_error}
    within = f"within --small-error {small_error:g} of the base"
    for name in changed:
        if name in lora:
            continue
        if drop_small:
            found.left[name] = _dropped(structure, name, refused)
        elif name in biases and experts:
            found.left[name] = "PEFT holds no biases beside LoRA of stacked experts"
        elif name in biases and name in small:
            found.left[name] = within
        elif name in biases:
            weight = biases[name]
            lora[weight] = replace(candidates[weight], bias=name)
        else:
            module = structure.holder(name)
            if module is None:
                found.left[name] = "its module holds the model's layers, too large to store"
            else:
                whole.setdefault(module, []).append(name)
    for module in [module for module, names in whole.items() if small.issuperset(names)]:
        found.left.update(dict.fromkeys(whole.pop(module), within))
    _save(structure, whole, lora, unsaved, found)
    found.beside = {name for names in whole.values() for name in names} - found.left.keys()
    found.beside |= {layer.bias for layer in lora.values() if layer.bias is not None}
    if not lora and found.saved and candidates:
        # Models that differ in what is stored whole only: PEFT loads no adapter without LoRA.
        free = [
            layer
            for layer in candidates.values()
            if not layer.is_parameter and layer.name not in found.exact
        ]
        swallowing = _swallowing(candidates, found.saved)
        if not free and not unsaved.keys() >= swallowing:
            # Such as BEiT's layers, for the scales that lie beside their matrices.
            reason = "its module holds the matrices that get LoRA"
            return assign(
                structure,
                changed,
                drop_small=drop_small,
                small_error=small_error,
                errors=errors,
                refused=refused,
                unsaved={**unsaved, **dict.fromkeys(swallowing, reason)},
                as_parameters=as_parameters,
            )
        if not free:
            raise CartError(
                "all matrices lie in modules that are stored whole for other tensors' sake, and "
                "PEFT loads no adapter without LoRA; leave those tensors out with --drop-small "
                "(drop_small)"
            )
        placeholder = min(free, key=lambda layer: layer.direction)
        lora[placeholder.name] = placeholder
    ordered = {name: lora[name] for name in structure.state if name in lora}
    found.lora = nested(ordered, structure)
    return found


def _dropped(structure: Structure, name: str, refused: Mapping[str, str]) -> str:
    """Why a tensor is left with `drop_small`: matrices are more than one expects it to drop."""
    why = refused.get(name.rpartition(".")[0])
    if why:
        return f"--drop-small; no LoRA: {why}"
    is_matrix = is_decomposed(name, tuple(structure.state[name].shape))
    if is_matrix and not structure.is_head(name):
        return "--drop-small; matrices that PEFT's LoRA has no layer for"
    return "--drop-small"


def _swallowing(candidates: Mapping[str, Layer], saved: Collection[str]) -> set[str]:
    """The modules stored whole that hold matrices of other modules."""
    return {
        module
        for module in saved
        if any(layer.module.startswith(f"{module}.") for layer in candidates.values())
    }


def _candidates(
    structure: Structure,
    refused: Collection[str],
    as_parameters: Collection[str],
    changed: Collection[str],
    drop_small: bool,
) -> dict[str, Layer]:
    """All tensors that LoRA can hold, in the model's order.

    A router is small: it is stored whole, unless that is not wanted.
    """
    found: dict[str, Layer] = {}
    rest = []
    for name in structure.state:
        module = name.rpartition(".")[0]
        if name not in structure.stored or module in refused:
            continue
        layer = None if module in as_parameters else structure.layer(name)
        if layer is None:
            if drop_small or module in as_parameters:
                rest.append(name)
        else:
            found[name] = layer
    if any(layer.is_parameter for name, layer in found.items() if name in changed):
        for name in rest:
            layer = structure.as_parameter(name)
            if layer is not None:
                found[name] = layer
    return {name: found[name] for name in structure.state if name in found}


def _save(
    structure: Structure,
    whole: dict[str, list[str]],
    lora: dict[str, Layer],
    unsaved: Mapping[str, str],
    found: Assignment,
) -> None:
    """Fix the modules to be saved; those that cannot be stay at the base."""
    for module in sorted(whole, key=len):
        if any(f"{module}.".startswith(f"{outer}.") for outer in found.saved):
            continue
        holders = _holders(structure, module)
        reason = _obstacle(structure, holders, lora, unsaved)
        if reason:
            for name in whole[module]:
                found.left[name] = reason
            continue
        found.saved += sorted(_matched(structure, holders))
    found.saved = _outermost(found.saved)
    for module in found.saved:
        for name in structure.below(module):
            lora.pop(name, None)
            found.left.pop(name, None)
            source = next(twin for twin in structure.twins(name) if twin in structure.stored)
            found.exact[name] = source


def _holders(structure: Structure, module: str) -> list[str]:
    """A module and those that have to be saved with it: tied tensors bring theirs."""
    found = {module}
    new = [module]
    while new:
        names = structure.below(new.pop())
        tied = {twin.rpartition(".")[0] for name in names for twin in structure.twins(name)[1:]}
        new += tied - found
        found |= tied
    return _outermost(sorted(found))


def _outermost(modules: list[str]) -> list[str]:
    """Those of some modules that lie in no other of them."""
    outer = tuple(f"{module}." for module in modules)
    return [module for module in modules if not module.startswith(outer)]


def _matched(structure: Structure, modules: Collection[str]) -> set[str]:
    """The modules that PEFT takes for those named: whatever ends like them."""
    return {path for path in structure.modules if path and path.endswith(tuple(modules))}


def _obstacle(
    structure: Structure,
    holders: Collection[str],
    lora: dict[str, Layer],
    unsaved: Mapping[str, str],
) -> str:
    """Why PEFT cannot store modules whole; empty if it can."""
    matched = _matched(structure, holders)
    for module in matched:
        if module in unsaved:
            return unsaved[module]
        inner = next((path for path in matched if path.startswith(f"{module}.")), None)
        if inner is not None:
            # Such as ViTModel's `embeddings` and its `embeddings.patch_embeddings`. No name says
            # which: PEFT 0.21.2 compares the ends of names that lack its `base_model.model.`.
            return f"PEFT would store {inner} twice: its name ends like that of {module}"
        for name in structure.below(module):
            if not any(twin in structure.stored for twin in structure.twins(name)):
                return f"the models lack {name}, which PEFT would store with it"
        if isinstance(structure.modules[module], (nn.ModuleList, nn.ModuleDict)):
            return f"PEFT would take {module} for it"
    inside = tuple(f"{module}." for module in holders)
    experts = any(layer.is_parameter for layer in lora.values())
    for layer in lora.values():
        if experts and layer.name.startswith(inside):
            # Such as gpt-oss's experts, which are nearly the whole model, for their biases; and
            # its attention for the sinks: of layers with experts no bias is stored either.
            return "its module holds matrices, too large to store beside stacked experts"
        # PEFT takes the names for regular expressions that match anywhere in a path.
        hit = any(re.match(rf"(^|.*\.){module}($|\..*)", layer.module) for module in matched)
        if hit and not layer.name.startswith(inside):
            return f"PEFT would take {layer.module} for it"
    return ""
