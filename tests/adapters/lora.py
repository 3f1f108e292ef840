"""Adapters of tiny models, and the whole models that they make."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cart_plugin import CartSettings, CartWarning, merge_state_dicts
from tests.doctor.tiny import save_model

warnings.filterwarnings("ignore", module=r"peft\.")  # on tied weights, and on embeddings

NAMES = ("math", "code", "german")
ATTENTION = ["q_proj", "v_proj"]


def load(base: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(base).eval()


def save_lora(
    folder: Path, base: Path, seed: int, *, kind: Any = None, scale: float = 0.05, **config: Any
) -> Path:
    """Save an adapter whose every tensor is random, with a rank of 4 unless the config has one."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        load(base, kind or transformers.AutoModelForCausalLM), peft.LoraConfig(**settings)
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    wrapped.save_pretrained(folder)
    return folder


def save_loras(
    folder: Path, base: Path, configs: Sequence[Mapping[str, Any]] = ({}, {}, {}), **common: Any
) -> list[Path]:
    """Save several, called by `NAMES` and then by numbers."""
    names = [*NAMES, *map(str, range(len(configs)))]
    return [
        save_lora(folder / names[seed], base, seed, **{**common, **config})
        for seed, config in enumerate(configs)
    ]


def save_base(folder: Path, architecture: str = "llama", **config: Any) -> Path:
    return save_model(folder / "base", architecture, 0, **config)


def state(base: Path, adapter: Path | None = None, kind: Any = None) -> dict[str, Tensor]:
    """The weights of a base, with an adapter merged into it by PEFT."""
    model = load(base, kind or transformers.AutoModelForCausalLM)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def whole(
    base: Path,
    adapters: Sequence[Path],
    settings: CartSettings | None,
    weights: Sequence[float] | None = None,
    kind: Any = None,
) -> dict[str, Tensor]:
    """The merge of the whole models; the weighted mean without settings."""
    fused = [state(base, adapter, kind) for adapter in adapters]
    settings = settings or CartSettings(rank_ratio=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CartWarning)  # two models, averages
        return merge_state_dicts(fused, settings, base=state(base, kind=kind), weights=weights)


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
