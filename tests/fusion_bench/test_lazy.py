"""Pools that read tensor by tensor: all of a model is merged or none, and each tensor once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("fusion_bench")

from fusion_bench import LazyStateDict
from fusion_bench.modelpool.causal_lm.causal_lm import CausalLMPool
from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool

from cart_plugin import CartError
from cart_plugin.fusion_bench import fleet
from cart_plugin.fusion_bench.algorithm import (
    CartAlgorithm,
    CartIndexingAlgorithm,
    CartUncenteredAlgorithm,
)
from cart_plugin.fusion_bench.analysis import CartAnalysisAlgorithm
from cart_plugin.merging.tensors import is_decomposed
from tests.fusion_bench import tiny
from tests.fusion_bench.test_cart import close, lazy

NAMES = ("a", "b", "c", "_pretrained_")


def saved(folder: Path, made: Any, shard: str = "5GB") -> dict[str, str]:
    """Folders of three models and a pretrained one."""
    places = {}
    for seed, name in enumerate(NAMES):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tiny.perturbed(made(), seed)
        places[name] = str(folder / name)
        model.save_pretrained(places[name], max_shard_size=shard)
    return places


def experts() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def dense(*, tied: bool = True) -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=32, n_positions=8, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
@pytest.mark.parametrize(
    "method",
    [
        CartAlgorithm(rank=2),
        CartAlgorithm(scaling_factor="auto"),
        CartUncenteredAlgorithm(rank=2),
        CartIndexingAlgorithm(rank=2),
        CartAnalysisAlgorithm,
    ],
    ids=["cart", "auto", "uncentered", "indexing", "analysis"],
)
def test_experts_that_files_hold_one_by_one_are_refused_before_anything_is_read(
    method: Any, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = saved(tmp_path, experts, shard)
    run = method(output_path=str(tmp_path)) if method is CartAnalysisAlgorithm else method
    monkeypatch.setattr(LazyStateDict, "__getitem__", None)
    with pytest.raises(CartError, match=r"a, read .* no model\.layers\.0\.mlp\.experts\.down_proj"):
        run.run(CausalLMPool(places, tokenizer=None, enable_lazy_loading=True))


def test_experts_are_merged_where_models_are_loaded_whole(tmp_path: Path) -> None:
    pool = CausalLMPool(saved(tmp_path, experts, "10KB"), tokenizer=None)
    merged = CartAlgorithm(rank=2).run(pool).state_dict()
    first = pool.load_model("a").state_dict()
    assert not any(torch.equal(tensor, first[name]) for name, tensor in merged.items())


@pytest.mark.parametrize("shard", ["2KB", "5GB"])
def test_tied_tensors_that_files_hold_once_are_no_difference(shard: str, tmp_path: Path) -> None:
    places = saved(tmp_path, dense, shard)
    whole, by_tensor = (
        CartAlgorithm(rank=2).run(CausalLMPool(places, tokenizer=None, enable_lazy_loading=lazily))
        for lazily in (False, True)
    )
    assert close(by_tensor, whole.state_dict())


def test_a_model_is_not_loaded_around_tensors_that_are_not_its_own(tmp_path: Path) -> None:
    model = lazy(saved(tmp_path, dense)).load_model("a")
    part = {name: tensor for name, tensor in model.items() if "mlp" not in name}
    cpu = torch.device("cpu")
    held = fleet.Fleet({"a": model}, {"a": part}, None, None, is_decomposed, {}, cpu, False)
    with pytest.raises(CartError, match=r"a, read .*: no transformer\.h\.0\.mlp"):
        held.with_tensors("a", part)


def test_state_dicts_without_a_class_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = LazyStateDictPool(saved(tmp_path, dense))
    monkeypatch.setattr(LazyStateDict, "__getitem__", None)
    with pytest.raises(CartError, match="meta_module_class"):
        CartAlgorithm(rank=2).run(pool)


@pytest.mark.parametrize(
    ("method", "times", "of_base"),
    [
        (CartAlgorithm(rank=2), 1, 0),
        (CartAlgorithm(scaling_factor="auto"), 1, 1),
        (CartUncenteredAlgorithm(rank=2), 1, 1),
        (CartUncenteredAlgorithm(rank=2, return_single_task_models=True), 1, 1),
        (CartIndexingAlgorithm(rank=2), 1, 0),
        (CartIndexingAlgorithm(target_size=0.9), 2, 0),
    ],
    ids=["cart", "auto", "uncentered", "single", "indexing", "target-size"],
)
def test_each_tensor_is_read_once(
    method: Any, times: int, of_base: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, str]] = Counter()
    load = LazyStateDict._load_tensor_from_checkpoint_file

    def counted(self: Any, file: str, key: str, **kwargs: Any) -> torch.Tensor:
        reads[Path(self.checkpoint).name, key] += 1
        return load(self, file, key, **kwargs)

    monkeypatch.setattr(LazyStateDict, "_load_tensor_from_checkpoint_file", counted)
    places = saved(tmp_path, lambda: dense(tied=False))
    method.run(lazy(places))
    names = set(LazyStateDict(places["a"]))
    expected = {(model, name): times for model in "abc" for name in names}
    expected |= {("_pretrained_", name): of_base for name in names if of_base}
    assert reads == expected


def test_values_that_a_lazy_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Files may hold some tensors in a wider dtype than the one the model is loaded in."""

    def mixed() -> Any:
        model = dense(tied=False).half()
        model.transformer.wte.float().weight.data[0, 0] = 7e4
        return model

    places = saved(tmp_path, mixed)
    with pytest.raises(
        CartError, match=r"'transformer.wte.weight' of a: .* range of torch\.float16"
    ):
        CartAlgorithm(rank=2).run(lazy(places))
