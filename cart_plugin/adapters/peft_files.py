"""The merged adapter as PEFT and other servers read it."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cart_plugin.adapters.work import Merge
from cart_plugin.checkpoints import side_files
from cart_plugin.checkpoints.adapters import plain_config
from cart_plugin.checkpoints.files import json_text
from cart_plugin.errors import CartError, first_line

_REPORT = "report.json"  # of another merge


def lora_config(merge: Merge) -> Any:
    """PEFT's config of the merged adapter: one rank for all modules, and one scale.

    That is what PEFT, vLLM, SGLang and llama.cpp read alike.

    Raises:
        CartError: PEFT refuses what the adapters have in common.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig(
            r=merge.rank,
            lora_alpha=round(merge.scale * merge.rank),
            lora_dropout=0.0,
            lora_bias=merge.plan.has_bias,
            **merge.plan.common,
        )
    except (ValueError, TypeError) as error:
        raise CartError(
            f"PEFT takes no adapter_config.json with what all of them have: {first_line(error)}; "
            "correct it in theirs"
        ) from None
    config.inference_mode = True
    return config


def config_text(merge: Merge) -> str:
    """The text of the merged adapter's adapter_config.json."""
    return json_text(plain_config(lora_config(merge)), sort_keys=True)


def copy_side_files(folders: Sequence[Path], out: Path) -> str | None:
    """Give the merged adapter the files beside weights and config that all adapters have alike.

    A tokenizer's files are taken together or not at all, and so are modules.json and the folders
    that it names.

    Returns:
        What to say of those that differ.
    """
    held = [_side_files(folder) for folder in folders]
    for files in held:
        files.pop(_REPORT, None)
    names = sorted(set().union(*held))
    alike = {
        name
        for name in names
        if all(
            name in files and filecmp.cmp(files[name], held[0][name], shallow=False)
            for files in held
        )
    }
    unlike = [name for name in names if name not in alike]
    for belongs in (side_files.is_tokenizer, side_files.is_of_modules):
        if any(belongs(name) for name in unlike):
            alike = {name for name in alike if not belongs(name)}
    for name in sorted(alike):
        side_files.put(held[0][name], out / name)
    if not unlike:
        return None
    left = [name for name in names if name not in alike]
    return f"not all adapters have the same {', '.join(left)}: left out"


def _side_files(folder: Path) -> dict[str, Path]:
    of_modules = side_files.belongings(folder) | side_files.module_weights(folder)
    own = {name: path for name, path in of_modules.items() if side_files.is_of_modules(name)}
    return side_files.side_files(folder) | own
