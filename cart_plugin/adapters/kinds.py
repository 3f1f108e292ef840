"""What an adapter's config says of it: whether it can be merged by its factors, and its scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cart_plugin.checkpoints.adapters import LORA
from cart_plugin.errors import CartError

WHOLE = (
    "merge it into its base (PEFT's merge_and_unload, then save_pretrained), and the whole models "
    "with `mergekit-cart merge`"
)
"""What to do with an adapter that is not merged here."""
_CONVERT = (
    "save it again with path_initial_model_for_weight_conversion, as PEFT's guide to LoRA says"
)

# Keys of LoraConfig that change nothing in what `B A` means, or that are handled.
_HANDLED = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "target_parameters", "lora_bias", "runtime_config"),
    # Of starts, and of what is refused or off.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core"),
}
# PEFT merges none of these into its base.
_ALONE = {
    "use_qalora": "QA-LoRA: it pools its inputs",
    "alora_invocation_tokens": "an activated LoRA: it acts after certain tokens only",
    "layer_replication": "made for a base whose layers are repeated",
}
_KNOWN = {
    "use_dora": "DoRA: it scales the base's own weights, too",
    **_ALONE,
    "trainable_token_indices": "one that trains single rows of the embedding",
    "ensure_weight_tying": "one that ties its factors to those of other modules",
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Other starts take a part of the base's weights away.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")


def check_kind(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA, and configs that say less than is needed.

    Args:
        name: the adapter's.
        config: its adapter_config.json.

    Raises:
        CartError: it is another kind of adapter, or one of LoRA's variants; or PEFT could not read
            its config either, or it names parameters that nothing of the adapter tells.
    """
    from peft import LoraConfig

    kind = str(config.get("peft_type", LORA)).upper()
    if kind != LORA:
        raise CartError(f"adapter {name} is no LoRA but {kind}; {WHOLE}")
    usual = LoraConfig().to_dict()
    # What this PEFT does not know it does not use either: see `newer_note`.
    variants = {*usual, *_KNOWN} - _HANDLED
    for key, value in config.items():
        if key not in variants or not value or value == usual.get(key):
            continue
        raise CartError(
            f"adapter {name} is {_KNOWN.get(key, 'a variant of LoRA that is not known here')} "
            f"({key} in adapter_config.json); "
            f"{'it can be used by itself only' if key in _ALONE else WHOLE}"
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise CartError(
            f"adapter {name} starts from the base's weights (init_lora_weights: {start!r}), of "
            f"which it takes a part away, so that its factors are not all that it changes; "
            f"{_CONVERT}, or {WHOLE}"
        )
    for key in _PATTERNS:
        for pattern in _pattern(name, config, key):
            try:
                re.compile(pattern)
            except re.error as error:
                raise CartError(
                    f"adapter {name}: {key} in adapter_config.json has {pattern!r}, which is no "
                    f"regular expression ({error}); correct it"
                ) from None
    for target in config.get("target_parameters") or ():
        if "." not in str(target):
            raise CartError(
                f"adapter {name}: target_parameters in adapter_config.json has {target!r}, and not "
                f"of which module; write that, too, as in mlp.experts.{target}: to PEFT it is the "
                "same"
            )


def newer_note(name: str, config: Mapping[str, Any]) -> str | None:
    """What to say of an adapter by a newer PEFT, with settings that the installed one has not.

    Args:
        name: the adapter's.
        config: its adapter_config.json.
    """
    import peft
    from packaging.version import InvalidVersion, Version

    said = str(config.get("peft_version") or "")
    try:
        # Built from its repository PEFT adds the commit: 0.22.1.dev0@3f2c1ab.
        if Version(said.partition("@")[0]) <= Version(peft.__version__):
            return None
    except InvalidVersion:
        return None
    known = {*_HANDLED, *peft.LoraConfig().to_dict()}
    unknown = [key for key, value in config.items() if value and key not in known]
    if not unknown:
        return None
    return (
        f"adapter {name} is of PEFT {said}, and the installed {peft.__version__} does not know "
        f"{', '.join(unknown)} of its adapter_config.json: if that makes it more than a plain "
        "LoRA, the merge is not what it does; install its PEFT and merge again, which then says so"
    )


def scale(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """What ``B A`` of a module is multiplied by.

    Args:
        name: the adapter's.
        config: its adapter_config.json.
        module: by its name in the base, which patterns are for.
        rank: of its factors.

    Raises:
        CartError: the config has another rank, or no numbers.
    """
    configured = _of_pattern(name, config, "rank_pattern", module, config.get("r", 8))
    if configured != rank:
        raise CartError(
            f"adapter {name}: {module} has rank {rank} in its weights and {configured:g} in "
            "adapter_config.json (r, rank_pattern), so that its scale is not known; correct the "
            "config, or copy the adapter again"
        )
    alpha = _of_pattern(name, config, "alpha_pattern", module, config.get("lora_alpha", 8))
    return _scaled(config, alpha, rank)


def of_parameters(name: str, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank of each matrix of a stacked parameter, which no shape shows, and its scale.

    Patterns are for names of parameters here, and what is for the module alone does not count.

    Args:
        name: the adapter's.
        config: its adapter_config.json.
        module: that holds the parameter.

    Raises:
        CartError: patterns give parameters of this module ranks or scales of their own.
    """
    for target in config.get("target_parameters") or ():
        leaf = str(target).rpartition(".")[2]
        for key in _PATTERNS:
            if _matched(_pattern(name, config, key), f"{module}.{leaf}"):
                raise CartError(
                    f"adapter {name}: {key} names {target} of target_parameters, and no tensor's "
                    f"name says which is that parameter's; {WHOLE}"
                )
    found = config.get("r", 8)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise CartError(f"adapter {name}: adapter_config.json has r: {found!r}; correct it")
    alpha = _number(name, "lora_alpha", module, config.get("lora_alpha", 8))
    return found, _scaled(config, alpha, found)


def _scaled(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(
    name: str, config: Mapping[str, Any], key: str, module: str, otherwise: object
) -> float:
    pattern = _pattern(name, config, key)
    found = pattern.get(_matched(pattern, module) or "", otherwise)
    return _number(name, f"{key} and what it departs from", module, found)


def _number(name: str, key: str, module: str, found: object) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise CartError(
            f"adapter {name}: adapter_config.json has {found!r} as the number for {module} "
            f"({key}); correct it"
        )
    return found


def _pattern(name: str, config: Mapping[str, Any], key: str) -> Mapping[str, object]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CartError(f"adapter {name}: {key} in adapter_config.json is no mapping; correct it")
    return found


def _matched(pattern: Mapping[str, object], module: str) -> str | None:
    """The key of a pattern that is for a module, by PEFT's own rule."""
    if not pattern:
        return None
    from peft.utils.other import get_pattern_key

    found: str = get_pattern_key(list(pattern), module)
    return found if found in pattern else None
