"""What a report says of a server that does not load the adapters is what happens there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cart_plugin.compress import compress, expand, load_task
from cart_plugin.compress.report import Report
from tests.compress.models import tensors
from tests.servers.servers import LIMIT, ask, divergence, loader, logprobs, save_models, start

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

# What models differ in, and what is asked of `compress` for them.
LAYERS = ("proj",)
CASES: dict[str, dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "LlamaForCausalLM": {
        "norms": ((*LAYERS, "norm"), {"rank": 8}),
        "embeddings": ((*LAYERS, "embed_tokens"), {"rank": 8}),
        "heads": ((*LAYERS, "lm_head"), {"rank": 8}),
        "all": (("",), {"rank": 8}),
        "ranks": (LAYERS, {"rank_ratio": 0.25}),
        "query": (("q_proj",), {"rank": 8}),
        "up": (("up_proj",), {"rank": 8, "layout": "servers"}),
    },
    "Qwen2ForCausalLM": {"biases": (LAYERS, {"rank": 8})},
    "MixtralForCausalLM": {"experts": ((*LAYERS, "experts"), {"rank": 8, "drop_small": True})},
}
SERVERS = {"llama_cpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}
SILENT = {"norms": {"llama.cpp"}, "embeddings": {"SGLang"}, "heads": {"SGLang"}}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory) -> tuple[Path, dict[str, Report]]:
    """A base, with a folder beside it for each case, and their reports."""
    folder = tmp_path_factory.mktemp(request.param)
    start(request.param).save_pretrained(folder / "base")
    reports = {}
    for name, (moved, options) in CASES[request.param].items():
        models = save_models(folder / f"{name}-models", request.param, moved)
        reports[name] = compress(models, folder / name, base=folder / "base", **options)
        expand(folder / name, "task0", folder / f"{name}-expanded")
    return folder, reports


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_does_as_the_report_says(server, made, tmp_path):
    folder, reports = made
    adapters = {name: folder / name / "adapters" / "task0" for name in reports}
    if server == "vllm":
        adapters.pop("experts", None)
        if not adapters:
            pytest.skip("vLLM needs a GPU for LoRA of experts, and the report promises nothing")
    answers = ask(server, folder / "base", adapters, tmp_path / server)
    for name in adapters:
        said, found = loader(reports[name].loaders, SERVERS[server]), answers[name]
        if not said.loads and not said.silent:
            assert "error" in found, (name, said)
            continue
        assert "error" not in found, (name, said, found)
        if server == "sglang":
            base, full = tensors(folder / "base"), load_task(folder / name, "task0")
            changed = {key for key in base if not torch.equal(full[key], base[key])}
            right = load_file(found["differences"]).keys() == changed
        else:
            right = divergence(logprobs(folder / f"{name}-expanded"), found) <= LIMIT
        assert (right, not right) == (bool(said.loads), said.silent), (name, said)


def test_silent_ones_are_warned_of(made):
    _, reports = made
    for name, report in reports.items():
        silent = {said.name for said in report.loaders if said.silent}
        assert silent == SILENT.get(name, set())
        warned = {who for who in SERVERS.values() for n in report.notes if f"not to {who}" in n}
        assert warned == silent
