"""A folder as the pages assume it: tiny models under ./models, adapters under ./adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.compress.conftest import compressed, models, originals
from tests.doctor.conftest import check, doctor, llamas, own_llamas, saved
from tests.doctor.tiny import save_models

__all__ = [
    "check",
    "compressed",
    "doctor",
    "llamas",
    "models",
    "originals",
    "own_llamas",
    "saved",
]

NAMES = ("math", "code", "german", "base")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the pages' examples, to be read only."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("workshop")
    (folder / "models").mkdir()
    for name, saved_to in zip(NAMES, save_models(folder, "llama", 4), strict=True):
        Path(saved_to).rename(folder / "models" / name)
    for seed, name in enumerate(NAMES[:3]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "models" / "base")
        config = LoraConfig(r=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / "adapters" / name)
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ./models and ./adapters as the pages name them."""
    for name in ("models", "adapters"):
        (tmp_path / name).symlink_to(workshop / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
