"""Models of other kinds than a plain Llama: experts, several modules, tokenizers, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from mergekit.scripts import merge_raw_pytorch
from safetensors.torch import save_file

from tests.doctor.tiny import load_tensors, save_model, save_models
from tests.mergekit.helpers import (
    DOWN,
    HIDDEN,
    KEY,
    QUERY,
    Tensors,
    invoke,
    is_average,
    is_cart,
    put,
)
from tests.support import random, relative_error


def test_experts_and_their_router_are_merged(merge: Callable[..., Tensors], tmp_path: Path) -> None:
    models = save_models(tmp_path, "qwen3-moe", original_format=False)
    merged = merge(models, parameters={"rank": 3})
    inputs = [load_tensors(model) for model in models]
    assert merged.keys() == inputs[0].keys()
    stacked = [name for name, tensor in merged.items() if tensor.ndim == 3]
    assert len(stacked) == 4
    for name in [*stacked, "model.layers.0.mlp.gate.weight"]:
        assert is_cart(merged, inputs, name, 3), name


def small_t5(folder: Path, seed: int) -> str:
    """Save a tiny encoder-decoder, which is two modules for mergekit."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def t5s(tmp_path: Path) -> list[str]:
    """Three of them."""
    return [small_t5(tmp_path / f"t5-{seed}", seed) for seed in range(3)]


def test_models_of_several_modules_are_merged(
    merge: Callable[..., Tensors], t5s: list[str]
) -> None:
    inputs = [load_tensors(model) for model in t5s]
    query = "{}.block.1.layer.0.SelfAttention.q.weight"
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    merged = merge(t5s, parameters={"rank": 2})
    assert is_cart(merged, inputs, query.format("encoder"), 2)
    assert is_cart(merged, inputs, query.format("decoder"), 2)
    assert is_average(merged, inputs, table)
    models = [{"model": model} for model in t5s]
    merged = merge(
        None,
        modules={
            "encoder": {"models": models, "parameters": {"rank": 1}},
            "decoder": {"models": models, "parameters": {"rank": 5}},
        },
    )
    assert is_cart(merged, inputs, query.format("encoder"), 1)
    assert is_cart(merged, inputs, query.format("decoder"), 5)


OPTIONAL = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("holders", [[0], [2], [0, 2], [0, 1, 2]], ids=repr)
@pytest.mark.parametrize("with_base", [False, True])
def test_an_optional_tensor_is_merged_from_those_that_have_it(
    holders: list[int],
    with_base: bool,
    merge: Callable[..., Tensors],
    t5s: list[str],
    tmp_path: Path,
) -> None:
    extra = {index: random(32, 2, seed=index) for index in holders}
    for index, tensor in extra.items():
        put(t5s[index], OPTIONAL, tensor)
    base = {"base_model": small_t5(tmp_path / "base", 9)} if with_base else {}
    merged = merge(t5s, **base)
    expected = torch.stack(list(extra.values())).mean(0)
    assert torch.allclose(merged[OPTIONAL], expected, atol=1e-6)


def test_center_base_does_not_ask_the_base_for_what_is_averaged(
    merge: Callable[..., Tensors], t5s: list[str], tmp_path: Path
) -> None:
    tensors = [random(32, 2, seed=seed) for seed in range(3)]
    for model, tensor in zip(t5s, tensors, strict=True):
        put(model, OPTIONAL, tensor)
    base = small_t5(tmp_path / "base", 9)
    merged = merge(t5s, base_model=base, parameters={"center": "base"})
    assert torch.allclose(merged[OPTIONAL], torch.stack(tensors).mean(0))


def test_an_optional_tensor_that_only_the_base_has_comes_from_the_base(
    merge: Callable[..., Tensors], t5s: list[str], tmp_path: Path
) -> None:
    base = small_t5(tmp_path / "base", 9)
    tensor = random(32, 2)
    put(base, OPTIONAL, tensor)
    assert torch.equal(merge(t5s, base_model=base)[OPTIONAL], tensor)


def save_tokenizer(folder: str, words: list[str]) -> None:
    """Save a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:with two models:cart_plugin.CartWarning")
@pytest.mark.parametrize("source", ["union", "base"])
@pytest.mark.parametrize("setting", ["tokenizer_source", "tokenizer"])
def test_vocabularies_are_aligned_before_they_are_averaged(
    source: str, setting: str, merge: Callable[..., Tensors], tmp_path: Path
) -> None:
    models = []
    for index in range(3):
        folder = save_model(tmp_path / f"model-{index}", "llama", index, vocab_size=64 + index)
        words = [f"word{i}" for i in range(1, 64)] + [f"own{index}-{i}" for i in range(index)]
        save_tokenizer(str(folder), words)
        models.append(str(folder))
    base = models[1]
    value = {"source": source} if setting == "tokenizer" else source
    merged = merge(models, base_model=base, **{setting: value})
    inputs = [load_tensors(model) for model in models]
    table = "model.embed_tokens.weight"
    assert merged[table].shape[0] == {"union": 64 + 1 + 2, "base": 65}[source]
    tuned = [inputs[0], inputs[2]]
    average = torch.stack([tensors[table][:64] for tensors in tuned]).mean(0)
    assert torch.allclose(merged[table][:64], average, atol=1e-6)
    config = json.loads((tmp_path / "merged-1" / "config.json").read_text())
    assert config["vocab_size"] == merged[table].shape[0]
    assert (tmp_path / "merged-1" / "tokenizer.json").is_file()


def save_lora(folder: Path, base: str, seed: int) -> str:
    """Save a random adapter of two modules of each layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


def test_adapters_are_merged_like_whole_models(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors], tmp_path: Path
) -> None:
    adapters = [save_lora(tmp_path / f"lora-{seed}", llamas[0], seed) for seed in range(3)]
    cache = tmp_path / "cache"
    merged = merge(
        [f"{llamas[0]}+{adapter}" for adapter in adapters],
        {"lora_merge_cache": str(cache)},
        parameters={"rank": 3},
    )
    tuned = [load_tensors(folder) for folder in cache.iterdir()]
    assert len(tuned) == 3
    assert is_cart(merged, tuned, QUERY.format(1), 3)
    assert not is_average(merged, tuned, DOWN.format(1))
    assert torch.allclose(merged[KEY.format(1)], inputs[0][KEY.format(1)])


def test_equal_models_give_themselves(merge: Callable[..., Tensors], own: list[str]) -> None:
    for folder in own[1:]:
        shutil.copy(Path(own[0]) / "model.safetensors", folder)
    merged = merge(own)
    for name, tensor in load_tensors(own[0]).items():
        assert relative_error(merged[name], tensor) <= 1e-6


def test_half_values_whose_sum_overflows_are_merged(
    merge: Callable[..., Tensors], own: list[str]
) -> None:
    large = torch.full((HIDDEN, HIDDEN), 6e4, dtype=torch.float16)
    for folder in own:
        put(folder, QUERY.format(0), large)
    assert torch.equal(merge(own)[QUERY.format(0)], large)


def test_a_tensor_may_be_empty(tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        files.append(str(tmp_path / f"{seed}.safetensors"))
        save_file({"fc.weight": random(4, 5, seed=seed), "e.weight": torch.zeros(0, 5)}, files[-1])
    result = invoke(merge_raw_pytorch.main, tmp_path, files)
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert merged["e.weight"].shape == (0, 5)
