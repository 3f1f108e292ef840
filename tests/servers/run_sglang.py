"""SGLang's own reading of adapters, without its engine, which needs a GPU. Run by `servers.run`."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig


def main() -> None:
    """Write the differences that adapters make, or why they are refused.

    The request is in the file named first; the answers go to the one named second, the differences
    to files beside it.
    """
    _do_without_torchvision()
    request = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    config = AutoConfig.from_pretrained(request["base"])
    results = {}
    for name, folder in request["adapters"].items():
        try:
            found = _differences(Path(folder), config)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        file = out.with_name(f"{name}.safetensors")
        save_file(found, file)
        results[name] = {"differences": str(file)}
    out.write_text(json.dumps(results))


def _do_without_torchvision() -> None:
    """Let SGLang be imported.

    The configs of 0.5.23 import torchvision for images, and what PyPI has of that fails beside
    torch's CPU build. Nothing of it is called here.
    """
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def _differences(folder: Path, config: object) -> dict:
    """Dense differences by the names of the model's layers, as SGLang would add them."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.utils import (
        get_normalized_target_modules,
        get_stacked_multiply,
        get_target_module_name,
    )

    settings = LoRAConfig(str(folder))
    adapter = LoRAAdapter("tried", settings, config, LoadConfig(), None)
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    targets = get_normalized_target_modules(settings.target_modules)
    fused = _fused(config)
    found = {}
    for layer in adapter.layers:
        # From here on as its memory pool does when it copies adapters to the GPU: whatever is no A
        # is a B, the last one counts, and shapes are asserted.
        sides: dict[str, dict[str, tuple[str, Tensor]]] = {"A": {}, "B": {}}
        for name, weight in layer.weights.items():
            target = get_target_module_name(name, targets)
            sides["A" if "lora_A" in name else "B"][target] = name, weight
        for target, (name, a) in sides["A"].items():
            b = sides["B"][target][1]
            count, rank = get_stacked_multiply(target), settings.r
            if a.shape[0] != count * rank or b.ndim != 2 or b.shape[1] != rank:
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ValueError(f"LoRA buffer shape does not match: {name} has {shapes}")
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            parts = fused.get(target, {target: b.shape[0]})
            pieces = zip(parts, a.split(rank), b.split(list(parts.values())), strict=True)
            for part, own_a, own_b in pieces:
                delta = adapter.scaling * (own_b.double() @ own_a.double())
                found[f"{module.rpartition('.')[0]}.{part}.weight"] = delta.float()
    return found


def _fused(config: object) -> dict[str, dict[str, int]]:
    """The layers that SGLang computes as one, and how many rows each has."""
    keys = config.head_dim * config.num_key_value_heads
    return {
        "qkv_proj": {
            "q_proj": config.head_dim * config.num_attention_heads,
            "k_proj": keys,
            "v_proj": keys,
        },
        "gate_up_proj": {
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        },
    }


if __name__ == "__main__":
    main()
