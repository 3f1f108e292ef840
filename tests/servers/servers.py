"""Tiny models for servers, and servers in their own environment (`make test-servers`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cart_plugin.checkpoints.servers import Loader
from tests.compress.models import load

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-servers"
CONVERTERS = ENVIRONMENT / "llama.cpp"
PROMPT = list(range(3, 20))
VOCABULARY = 96
MAX_RANK = 128
LIMIT = 1e-9  # of divergences: fp32 gives 1e-13, a model without its adapter 0.1

# Sizes that servers' kernels take: heads of 32. Keys and values have half the heads, and so half
# the rank of the other layers by a rank ratio.
_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SIZES,
    "MistralForCausalLM": {**_SIZES, "sliding_window": None},
    "MixtralForCausalLM": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": _SIZES,
    "Qwen3ForCausalLM": _SIZES,
}


def start(architecture: str) -> Any:
    """A small random model."""
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(**ARCHITECTURES[architecture]))


def save_models(folder: Path, architecture: str, moved: tuple[str, ...] = ("",)) -> list[Path]:
    """Two models of one start that differ in parameters whose names hold one of ``moved``."""
    places = []
    for seed in range(2):
        model = start(architecture)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if any(part in name for part in moved):
                parameter.data.add_(noise, alpha=0.05)
        places.append(folder / f"task{seed}")
        model.save_pretrained(places[-1])
    return places


def ask(server: str, base: Path, adapters: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What a server answers to `PROMPT`, by the adapter's name and "" for none.

    Each answer has "logprobs" ``(positions, vocabulary)``, or "error"; of SGLang "differences".
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{ENVIRONMENT} is missing: run `make test-servers`")
    folder.mkdir()
    request, answers = folder / "request.json", folder / "answers.json"
    asked = {
        "base": str(base),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "prompt": PROMPT,
        "vocabulary": VOCABULARY,
        "max_rank": MAX_RANK,
        "converters": str(CONVERTERS),
    }
    request.write_text(json.dumps(asked))
    script = Path(__file__).with_name(f"run_{server}.py")
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = folder / "log"
    with log.open("w") as file:
        done = subprocess.run(
            [python, script, request, answers],
            env={**inherited, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return json.loads(answers.read_text())


def logprobs(model: Path) -> Tensor:
    """What transformers answers to `PROMPT`, as servers do: ``(positions, vocabulary)``."""
    with torch.no_grad():
        found = load(model, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0, :-1]
    return found.double().log_softmax(-1)


def divergence(expected: Tensor, answer: dict[str, Any]) -> float:
    """The largest Kullback-Leibler divergence of an answer from what is expected, of positions."""
    assert "error" not in answer, answer["error"]
    # Servers round their log probabilities to fp32: of numbers that do not quite add up to 1.
    found = torch.tensor(answer["logprobs"], dtype=torch.float64).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).max())


def loader(loaders: list[Loader], name: str) -> Loader:
    """What a report says of a program."""
    (found,) = [loader for loader in loaders if loader.name == name]
    return found
