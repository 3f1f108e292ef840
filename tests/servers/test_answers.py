"""Servers with adapters answer as the expanded models do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cart_plugin.compress import compress, expand, load_task
from cart_plugin.compress.report import Report
from cart_plugin.compress.servers import TRIED
from tests.compress.models import tensors
from tests.servers.servers import (
    ARCHITECTURES,
    LIMIT,
    MAX_RANK,
    ask,
    divergence,
    loader,
    logprobs,
    save_models,
)

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

# By a rank ratio and by energy, layers of these models have several ranks.
OPTIONS: dict[str, dict[str, Any]] = {
    "servers": {"layout": "servers", "rank_ratio": 0.25},
    "servers-energy": {"layout": "servers", "energy": 0.5},
    "servers-size": {"layout": "servers", "target_size": 0.8},
    "peft-small": {"drop_small": True, "rank_ratio": 0.25},
    "peft-energy": {"drop_small": True, "energy": 0.5},
}
TASK = "task1"


@dataclass
class Made:
    """Models of an architecture, compressed in several ways around the same base."""

    architecture: str
    folder: Path
    reports: dict[str, Report] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "servers" / "base"

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self.folder / name / "adapters" / TASK for name in self.reports}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, tmp_path_factory) -> Made:
    found = Made(request.param, tmp_path_factory.mktemp(request.param))
    models = save_models(found.folder, request.param)
    for name, options in OPTIONS.items():
        # Stacked experts are the one thing beside linear layers that --drop-small keeps.
        if request.param == "MixtralForCausalLM" and name.startswith("peft"):
            continue
        found.reports[name] = compress(models, found.folder / name, **options)
        expand(found.folder / name, TASK, found.folder / f"{name}-expanded")
    weights = [found.folder / name / "base" / "model.safetensors" for name in found.reports]
    assert len({file.read_bytes() for file in weights}) == 1
    return found


@pytest.mark.parametrize("server", ["llama_cpp", "vllm"])
def test_a_server_answers_as_the_expanded_model(server, made, tmp_path):
    called = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}[server]
    if made.architecture not in TRIED[called]:
        assert all(loader(report.loaders, called).loads is None for report in made.reports.values())
        pytest.skip(f"LoRA of {made.architecture} needs a GPU in {called}, and nothing is promised")
    found = ask(server, made.base, made.adapters, tmp_path / server)
    assert divergence(logprobs(made.base), found[""]) <= LIMIT
    for name, report in made.reports.items():
        expected = logprobs(made.folder / f"{name}-expanded")
        assert divergence(expected, found[""]) > 1e-3, "the adapter changes nothing"
        assert divergence(expected, found[name]) <= LIMIT, name
        assert loader(report.loaders, called).loads, name


def test_sglang_adds_the_differences_of_the_expanded_model(made, tmp_path):
    found = ask("sglang", made.base, made.adapters, tmp_path / "sglang")
    base = tensors(made.base)
    for name, report in made.reports.items():
        if not loader(report.loaders, "SGLang").loads:
            assert name.startswith("peft")
            assert "error" in found[name]
            continue
        differences = load_file(found[name]["differences"])
        full = load_task(made.folder / name, TASK)
        changed = {key for key in base if not torch.equal(full[key], base[key])}
        assert changed == differences.keys()
        for key, difference in differences.items():
            torch.testing.assert_close(base[key] + difference, full[key], atol=1e-6, rtol=1e-6)


def test_ranks_reach_what_vllm_is_told(made):
    for report in made.reports.values():
        hint = loader(report.loaders, "vLLM").hint
        assert int(hint.rpartition(" ")[2]) <= MAX_RANK
