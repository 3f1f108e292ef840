"""Which modules PEFT wraps for the merged adapter: those that the adapters' configs select."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cart_plugin.adapters.inputs import Adapter

TARGETS = "target_modules"
_OTHERS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def selection(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The keys of the merged adapter's config that select modules.

    What selects the adapters' own, wherever one config can select those of all. Full names from the
    files are the last resort: of adapters that an older transformers saved PEFT renames the tensors
    as it loads them, and not what selects the modules.
    """
    found = _shared(adapters)
    return {**dict.fromkeys(_OTHERS), TARGETS: _full_names(adapters)} if found is None else found


def notes(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Says where modules are selected by the names that the adapters' files have."""
    # Of a loaded model they are the model's own.
    are_files = any(adapter.checkpoint.files for adapter in adapters)
    if are_files and _shared(adapters) is None and _full_names(adapters):
        yield (
            f"no one {TARGETS} selects the modules of all adapters ({', '.join(_OTHERS)} count, "
            "too), so that the merge lists full names, as their files have them: modules that the "
            "base calls otherwise, as with adapters of another version of transformers, PEFT "
            "leaves out without a word; load the adapters with the base and merge them there "
            "(merge_loaded)"
        )


def _shared(adapters: Sequence[Adapter]) -> dict[str, Any] | None:
    """What selects in PEFT the modules of all adapters and no others, if one config can."""
    configs = [adapter.checkpoint.config for adapter in adapters]
    others = [{key: _plain(config.get(key)) for key in _OTHERS} for config in configs]
    if any(other != others[0] for other in others):
        return None
    targets: list[Any] = [config.get(TARGETS) for config in configs]
    if isinstance(targets[0], str) and all(own == targets[0] for own in targets):
        return {**others[0], TARGETS: targets[0]}
    if all(isinstance(own, list) and all(isinstance(one, str) for one in own) for own in targets):
        # PEFT takes a module that any entry of a list means.
        return {**others[0], TARGETS: sorted(set().union(*targets))}
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(value) or None
    return None if value == "" else value


def _full_names(adapters: Sequence[Adapter]) -> list[str] | None:
    modules = {
        module
        for adapter in adapters
        for module, layer in adapter.layers.items()
        if layer.shape.kind != "experts"  # target_parameters says which
    }
    return sorted(modules) or None
