"""Tiny GPT-2 models: with a head and without, and with the buffers of old checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SETTINGS = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}


def save_gpt2(folder: Path, kind: str, seed: int, **config: Any) -> str:
    """Save a random model of a class; its folder."""
    torch.manual_seed(seed)
    settings = transformers.GPT2Config(**{**SETTINGS, "pad_token_id": 0, **config})
    getattr(transformers, kind)(settings).save_pretrained(folder)
    return str(folder)
