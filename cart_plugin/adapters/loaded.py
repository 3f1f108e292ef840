"""The adapters of a loaded PeftModel, merged into a new one of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cart_plugin.adapters import inputs, peft_files, settings
from cart_plugin.adapters.agreement import agree
from cart_plugin.adapters.report import Report, Sums
from cart_plugin.adapters.work import Done, Merge
from cart_plugin.checkpoints.adapters import PREFIX, plain_config
from cart_plugin.checkpoints.files import json_text
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError, first_line


@dataclass
class _InMemory(Checkpoint):
    """An adapter of a model, in the place of one on the disk."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        value = self.values[name].detach()
        if value.is_meta:
            raise CartError(
                f"the model's tensor {name!r} is offloaded (on the meta device); merge the "
                "adapters' folders (merge_adapters), or load the model without offloading"
            )
        return value.cpu()

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())


def merge_loaded(
    model: Any,
    adapters: Sequence[str],
    name: str = "merged",
    *,
    method: Literal["auto", "cart", "linear"] = "auto",
    rank: int | Literal["full"] | None = None,
    weights: Sequence[float] | None = None,
    lambda_: float | None = None,
    rank_ratio: float | None = None,
    keep: int | None = None,
) -> Report:
    """Merge LoRA adapters of a loaded model into a new one of it.

    As `cart_plugin.adapters.merge_adapters`, where the parameters are explained, through PEFT's
    public functions. The model's active adapter stays active.

    Args:
        model: a `peft.PeftModel`.
        adapters: names of its adapters.
        name: of the new one.
        method: as there.
        rank: as there.
        weights: as there.
        lambda_: as there.
        rank_ratio: as there.
        keep: as there.

    Returns:
        What is kept of each adapter, and what they have in common.

    Raises:
        CartError: adapters that cannot be merged, or that PEFT does not hold beside each other; the
            model is then as it was.
    """
    started = time.perf_counter()
    _check_is_peft(model)
    adapters = settings.listed(adapters)
    request = settings.request(
        method=method, rank=rank, lambda_=lambda_, rank_ratio=rank_ratio, keep=keep
    )
    shares = settings.shares_of(weights, len(adapters)) if adapters else []
    names = settings.names_of(adapters, adapters)
    known = list(model.peft_config)
    for adapter in names:
        if adapter not in known:
            raise CartError(f"the model has no adapter {adapter!r}; it has {', '.join(known)}")
    if not isinstance(name, str) or not name or "." in name or name in _parts(model):
        raise CartError(
            f"name the new adapter otherwise than {name!r}: a name without dots that is no adapter "
            "of the model, and no part of its modules' names"
        )
    plan = agree([_opened(model, adapter) for adapter in names], None)
    by_name = dict(zip(names, shares, strict=True))
    merge = Merge(plan, request, [by_name[adapter.name] for adapter in plan.adapters])
    report, sums = Report(merge, {adapter: adapter for adapter in names}), Sums(merge)
    state: dict[str, Tensor] = {}

    def take(done: Done) -> None:
        state.update(done.tensors)
        sums.add(done)

    merge.weights(take)
    state.update(merge.whole())
    sums.fill(report)
    report.bytes = sum(tensor.nbytes for tensor in state.values())
    _add(model, name, merge, state)
    report.seconds = time.perf_counter() - started
    return report


def _check_is_peft(model: Any) -> None:
    from peft import PeftMixedModel, PeftModel

    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise CartError(
            f"model must be a PeftModel, got {type(model).__name__}; load the adapters by "
            "PeftModel.from_pretrained and load_adapter, or merge their folders (merge_adapters)"
        )


def _add(model: Any, name: str, merge: Merge, state: dict[str, Tensor]) -> None:
    """Give a model an adapter, or leave it as it is.

    Raises:
        CartError: PEFT does not take it.
    """
    from peft import set_peft_model_state_dict

    config = peft_files.lora_config(merge)
    active = model.active_adapters if hasattr(model, "active_adapters") else [model.active_adapter]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        # PEFT makes it of the base's dtype, or of fp32.
        in_fp32 = merge.dtype == torch.float32
        model.add_adapter(name, config, autocast_adapter_dtype=in_fp32)
        found: Any = set_peft_model_state_dict(model, state, adapter_name=name)
        lost = [key for key in found.unexpected_keys if f".{name}" in key]
        lost += [key for key in found.missing_keys if f".{name}." in key]
        if lost:
            raise CartError(f"PEFT has no place for {lost[0]}")
    except BaseException as error:
        # PEFT 0.21.2 forgets the config of an adapter that it could not add, and leaves layers.
        model.peft_config.setdefault(name, config)
        model.delete_adapter(name)
        model.base_model.set_adapter(list(active))
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if not isinstance(error, (ValueError, TypeError, KeyError, RuntimeError)):
            raise
        raise CartError(
            f"PEFT does not hold this merge beside the model's other adapters: "
            f"{error if isinstance(error, CartError) else first_line(error)}; merge the adapters' "
            "folders (merge_adapters) and load the result by itself"
        ) from error


def _opened(model: Any, name: str) -> inputs.Adapter:
    """An adapter of a model.

    Raises:
        CartError: it is none that can be merged, or PEFT does not tell it from the model.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    values = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    info = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in values.items()}
    # As in its file: enums by their values, sets as lists. Of patterns the first that fits counts.
    config = json.loads(json_text(plain_config(model.peft_config[name])))
    if any("." not in str(target) for target in config.get("target_parameters") or ()):
        # PEFT 0.21.2 on transformers 5: experts that were trained one by one become stacked ones.
        raise CartError(
            f"the target_parameters of adapter {name} name no modules, as PEFT has it of experts "
            "that were trained one by one; merge the adapters' folders (merge_adapters)"
        )
    found = inputs.sorted_adapter(
        _InMemory(name, Path(), config, info, values=values),
        "the model has been unloaded or merged: load the adapters again",
    )
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name not in {*module.lora_A, *module.lora_embedding_A}:
            continue
        layer = found.layers.get(path.removeprefix(PREFIX))
        if layer is None:
            # PEFT 0.21.2 leaves out whatever has another adapter's name as a part of its own.
            raise CartError(
                f"PEFT gives {path} for another adapter's and not for {name}'s, because an adapter "
                "is called as a part of that name; load the adapters by other names"
            )
        # The model's own, which a user may have changed (`scale_layer`).
        scale = float(module.scaling[name])
        found.layers[layer.factors.module] = replace(layer, scale=scale)
    return found


def _parts(model: Any) -> set[str]:
    """What the names of a model's tensors consist of, those of its adapters included."""
    return {part for name in model.state_dict() for part in name.split(".")}
