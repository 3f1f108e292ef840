"""What a report says of a server that does not load the adapters is what happens there."""

from __future__ import annotations

from typing import Any

import pytest

from cart_plugin.compress import compress, expand
from tests.servers.servers import ask, divergence, loader, logprobs, save_models

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

_LAYERS = ("proj",)
# What models differ in, beside their linear layers, and what is asked of `compress`.
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "norms": ("LlamaForCausalLM", (*_LAYERS, "norm"), {}),
    "embeddings": ("LlamaForCausalLM", (*_LAYERS, "embed_tokens"), {}),
    "heads": ("LlamaForCausalLM", (*_LAYERS, "lm_head"), {}),
    "all": ("LlamaForCausalLM", ("",), {}),
    "biases": ("Qwen2ForCausalLM", ("proj",), {}),
    "experts": ("MixtralForCausalLM", (*_LAYERS, "experts"), {"drop_small": True}),
    "ranks": ("LlamaForCausalLM", _LAYERS, {}),
    "query": ("LlamaForCausalLM", ("q_proj",), {}),
    "up": ("LlamaForCausalLM", ("up_proj",), {"layout": "servers"}),
}
SERVERS = {"llama_cpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    architecture, moved, options = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    models = save_models(folder, architecture, moved)
    report = compress(models, folder / "out", rank_ratio=0.25, **options)
    expand(folder / "out", "task0", folder / "expanded")
    return request.param, folder, report


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_does_as_the_report_says(server, made, tmp_path):
    name, folder, report = made
    said = loader(report.loaders, SERVERS[server])
    if (server, name) == ("vllm", "experts"):
        pytest.skip("vLLM's LoRA of experts needs a GPU; the report promises nothing")
    adapters = {"adapter": folder / "out" / "adapters" / "task0"}
    found = ask(server, folder / "out" / "base", adapters, tmp_path / server)["adapter"]
    if not said.loads and not said.silent:
        assert "error" in found, (name, said)
    elif server == "sglang":
        assert said.loads, (name, said)
        assert "differences" in found, found
    else:
        lost = divergence(logprobs(folder / "expanded"), found)
        assert (lost <= 1e-6) == bool(said.loads), (name, said, lost)
        assert said.silent == (lost > 1e-6)


def test_the_one_silent_case_is_told(made):
    name, _, report = made
    silent = [said.name for said in report.loaders if said.silent]
    assert silent == (["llama.cpp"] if name == "norms" else [])
    assert any("not to llama.cpp" in note for note in report.notes) == bool(silent)
