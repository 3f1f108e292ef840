"""A tiny base, models of it, and adapters, to be read only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from cart_plugin.cli import main
from tests.adapters.lora import save_base, save_loras
from tests.support import random

NAMES = ["math", "code", "german"]


def tune(base: Path, folder: Path, seed: int, scale: float = 0.05) -> Path:
    """A copy of a model in which every matrix has moved."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    for number, name in enumerate(sorted(tensors)):
        noise = random(*tensors[name].shape, seed=1000 * seed + number)
        tensors[name] = tensors[name] + scale * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_tokenizer(folder: Path) -> None:
    """One of whole words, which are numbers below 60."""
    words = {"<unk>": 0, **{str(number): number + 1 for number in range(60)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("inspect-base"), num_hidden_layers=2)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("inspect-models")
    return [tune(base, place / name, seed) for seed, name in enumerate(NAMES)]


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_loras(tmp_path_factory.mktemp("inspect-adapters"), base)


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command; errors are one line and no traceback."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
        assert not result.exception or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a document."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from numbers(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif isinstance(value, float):
        yield value


def break_tensor(folder: Path, name: str, value: float | torch.Tensor) -> None:
    """Put one value into a tensor, or another tensor in its place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    else:
        tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
