"""The method `cart` through mergekit's own interfaces, on tiny checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge_methods as methods
import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import legacy, merge_raw_pytorch, multimerge, run_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from cart_plugin.errors import CartError, CartWarning
from cart_plugin.krylov import leading_subspace
from cart_plugin.mergekit import register
from tests.cli.tiny import load_tensors, save_model, save_models, write_recipe
from tests.support import cart_formula, power_law, random, relative_error, with_spectrum

register()

Tensors = dict[str, Tensor]

QUERY = "model.layers.{}.self_attn.q_proj.weight"
KEY = "model.layers.{}.self_attn.k_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
QUIET = ["--no-write-model-card", "--no-copy-tokenizer", "--quiet"]
HIDDEN, LAYERS = 32, 5


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five Llama models, not to be changed."""
    return save_models(tmp_path_factory.mktemp("llamas"), "llama", 5)


@pytest.fixture(scope="module")
def inputs(llamas: list[str]) -> list[Tensors]:
    """What they hold."""
    return [load_tensors(folder) for folder in llamas]


@pytest.fixture
def own(llamas: list[str], tmp_path: Path) -> list[str]:
    """Three of them that a test may break."""
    return [shutil.copytree(llamas[i], tmp_path / f"own-{i}").as_posix() for i in range(3)]


def edit(folder: str, change: Callable[[Tensors], Tensors | None]) -> None:
    """Change the tensors of a model in place, or replace them."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def put(folder: str, name: str, tensor: Tensor) -> None:
    """Put a tensor into a model, in place of another or beside the others."""
    edit(folder, lambda tensors: tensors | {name: tensor})


def run(recipe: Path, out: Path, **options: Any) -> Tensors:
    """Merge in this process as `mergekit-yaml` does; what the output holds."""
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    defaults = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
    run_merge(config, str(out), MergeOptions(**{**defaults, **options}))
    return load_tensors(out)


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Tensors]:
    """Merge models with a recipe given by its keys."""
    runs = 0

    def merge(
        models: list[Any] | None, options: dict[str, Any] | None = None, **recipe: Any
    ) -> Tensors:
        nonlocal runs
        runs += 1
        listed = [{"model": model} if isinstance(model, str) else model for model in models or ()]
        file = write_recipe(
            tmp_path / f"recipe-{runs}.yaml", [], **{"models": listed or None, **recipe}
        )
        return run(file, tmp_path / f"merged-{runs}", **(options or {}))

    return merge


def is_cart(merged: Tensors, inputs: list[Tensors], name: str, k: int, **parameters: Any) -> bool:
    """Whether a tensor is what the equation says."""
    base = parameters.pop("base", None)
    expected = cart_formula(
        [tensors[name] for tensors in inputs],
        k,
        base=None if base is None else base[name],
        **parameters,
    )
    tolerance = torch.finfo(merged[name].dtype).eps
    return relative_error(merged[name], expected) <= max(tolerance, 1e-5)


def is_average(
    merged: Tensors, inputs: list[Tensors], name: str, weights: list[float] | None = None
) -> bool:
    """Whether a tensor is the weighted mean of the inputs'."""
    return is_cart(merged, inputs, name, 0, weights=weights)


def digest(folder: Path) -> str:
    """One hash of the weight files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- Python interfaces -------------------------------------------------------------------------


def matrices(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(20, 30, seed=seed, dtype=dtype) for seed in range(count)]


def test_merge_tensors_takes_the_parameters_of_a_recipe() -> None:
    tensors = matrices()
    merged = methods.merge_tensors(tensors, "cart")
    assert relative_error(merged, cart_formula(tensors, 1)) <= 1e-5
    parameters = {"rank_ratio": 0.2, "lambda": 1.5, "weight": [1.0, 2.0, 3.0, 0.5]}
    merged = methods.merge_tensors(tensors, "cart", parameters=parameters)
    expected = cart_formula(tensors, 4, scale=1.5, weights=[1.0, 2.0, 3.0, 0.5])
    assert relative_error(merged, expected) <= 1e-5
    merged = methods.merge_tensors(tensors, "cart", parameters={"rank": 3, "svd": "exact"})
    assert relative_error(merged, cart_formula(tensors, 3)) <= 1e-5


def test_merge_tensors_binds_weights_by_name_and_leaves_the_base_out() -> None:
    tensors = matrices()
    merged = methods.merge_tensors(
        tensors,
        "cart",
        ids=["a", "b", "base", "c"],
        base_index=2,
        parameters={"rank": 2, "weight": {"c": 3.0, "a": 1.0, "b": 2.0}},
    )
    tuned = [tensors[i] for i in (0, 1, 3)]
    expected = cart_formula(tuned, 2, weights=[1.0, 2.0, 3.0])
    assert relative_error(merged, expected) <= 1e-5
    merged = methods.merge_tensors(
        tensors, "cart", base_index=2, parameters={"rank": 2, "center": "base"}
    )
    assert relative_error(merged, cart_formula(tuned, 2, base=tensors[2])) <= 1e-5


def test_merge_tensors_keeps_or_casts_the_dtype() -> None:
    halves = matrices(dtype=torch.bfloat16)
    merged = methods.merge_tensors(halves, "cart")
    single = methods.merge_tensors(halves, "cart", dtype=torch.float32)
    assert (merged.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(merged, single.to(torch.bfloat16))
    cast = methods.merge_tensors(halves, "cart", out_dtype=torch.float16)
    assert cast.dtype == torch.float16


def test_merge_state_dicts_knows_tables_by_their_names() -> None:
    models = [
        {
            "lm_head.weight": random(20, 30, seed=seed),
            "fc.weight": random(20, 30, seed=seed + 10),
            "steps": torch.tensor(7),
        }
        for seed in range(3)
    ]
    merged = methods.merge_state_dicts(models, "cart", parameters={"rank": 2})
    assert list(merged) == list(models[0])
    assert is_average(merged, models, "lm_head.weight")
    assert is_cart(merged, models, "fc.weight", 2)
    assert merged["steps"] == 7


def test_merge_state_dicts_takes_modules_and_a_base() -> None:
    modules = {}
    for seed, name in enumerate(["base", "a", "b", "c"]):
        torch.manual_seed(seed)
        modules[name] = torch.nn.Linear(30, 20)
    merged = methods.merge_state_dicts(
        modules, "cart", base="base", parameters={"rank": 2, "center": "base"}
    )
    states = [modules[name].state_dict() for name in "abc"]
    assert is_cart(merged, states, "weight", 2, base=modules["base"].state_dict())
    assert is_average(merged, states, "bias")


def test_tables_that_mergekit_marks_are_averaged_whatever_their_name() -> None:
    tensors = matrices()
    for axis, k in ((0, 0), (1, 0), (None, 2)):
        group = methods.TensorGroup.from_tensors(
            tensors, name="model.output.weight", vocabulary_axis=axis
        )
        (merged,) = methods.get("cart")([group], parameters={"rank": 2})
        assert relative_error(merged, cart_formula(tensors, k)) <= 1e-5


def test_unknown_parameters_are_refused_where_mergekit_lets_us_see_them() -> None:
    with pytest.raises(TypeError, match=r"Unknown parameter.* for cart: rank_rati"):
        methods.merge_tensors(matrices(), "cart", parameters={"rank_rati": 0.1})
    models = [{"w": tensor} for tensor in matrices()]
    with pytest.raises(TypeError, match="rank_rati"):
        methods.merge_state_dicts(models, "cart", parameters={"rank_rati": 0.1})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": "abc"}, "rank_ratio must be a number, got 'abc'"),
        ({"rank_ratio": True}, "rank_ratio must be a number, got True"),
        ({"rank": -3}, "rank must be 0 or a positive whole number, got -3"),
        ({"rank": math.inf}, "rank must be a finite number, got inf"),
        ({"energy": -0.5}, r"energy must lie between 0 and 1, got -0\.5"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"lambda": "x"}, "lambda must be a number, got 'x'"),
        ({"lambda": math.nan}, "lambda must be a finite number, got nan"),
        ({"weight": math.nan}, "weight must be a finite number, got nan"),
        ({"weight": [1.0, -1.0, 0.0, 0.0]}, "weights must sum to more than 0"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"center": "base"}, "center is 'base' but there is no base model"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, got 'quick'"),
    ],
    ids=repr,
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.merge_tensors(matrices(), "cart", parameters=parameters)


def test_one_model_is_refused_and_two_warn() -> None:
    with pytest.raises(CartError, match="at least two fine-tuned models beside the base"):
        methods.merge_tensors(matrices(1), "cart")
    with pytest.raises(CartError, match="got 1: 1"):
        methods.merge_tensors(matrices(2), "cart", base_index=0)
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = methods.merge_tensors(matrices(2), "cart")
    assert relative_error(merged, cart_formula(matrices(2), 0)) <= 1e-6


def test_registering_again_changes_nothing() -> None:
    before = methods.registered_methods()
    register()
    assert methods.registered_methods() == before
    assert [method.spec.name for method in before].count("cart") == 1


# --- recipes -----------------------------------------------------------------------------------


def test_matrices_are_decomposed_and_everything_else_is_averaged(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(llamas)
    assert merged.keys() == inputs[0].keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        decomposed = tensor.ndim == 2 and name not in TABLES
        k = math.floor(0.08 * min(tensor.shape)) if decomposed else 0
        assert is_cart(merged, inputs, name, k), name
        assert is_average(merged, inputs, name) != decomposed, name


def test_filters_choose_by_tensor_name(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(
        llamas,
        parameters={
            "rank_ratio": [
                {"filter": "self_attn", "value": 0.25},
                {"filter": "down_proj", "value": 0.0},
                {"value": 0.5},
            ],
            "lambda": [{"filter": "q_proj", "value": 2.0}, {"value": 0.5}],
        },
    )
    assert is_cart(merged, inputs, QUERY.format(1), 8, scale=2.0)
    assert is_cart(merged, inputs, KEY.format(1), 4, scale=0.5)
    assert is_average(merged, inputs, DOWN.format(1))
    assert is_cart(merged, inputs, "model.layers.1.mlp.up_proj.weight", 16, scale=0.5)


def test_rank_rules_may_differ_between_tensors(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(
        llamas,
        parameters={
            "rank": [{"filter": "q_proj", "value": 3}],
            "energy": [{"filter": "k_proj", "value": 1.0}],
        },
    )
    assert is_cart(merged, inputs, QUERY.format(1), 3)
    assert is_average(merged, inputs, KEY.format(1))
    assert is_cart(merged, inputs, DOWN.format(1), 2)


def test_gradients_change_from_layer_to_layer(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weighted = [{"model": llamas[0], "parameters": {"weight": [1.0, 3.0]}}, *llamas[1:4]]
    merged = merge(
        weighted,
        parameters={"rank": [0, 7], "lambda": [1.0, 2.0], "svd": "exact"},
    )
    # Layer 2 of 5 has the rank 3.5, which is cut to 3.
    for layer, k in enumerate([0, 1, 3, 5, 7]):
        weights = [1.0 + layer / 2, 1.0, 1.0, 1.0]
        scale = 1.0 + layer / 4
        name = QUERY.format(layer)
        assert is_cart(merged, inputs[:4], name, k, scale=scale, weights=weights), layer


def test_gradient_of_rank_ratio(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(llamas, parameters={"rank_ratio": [0.0, 0.25, 0.0]})
    for layer, k in enumerate([0, 4, 8, 4, 0]):
        assert is_cart(merged, inputs, QUERY.format(layer), k), layer


def test_weights_belong_to_models(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weights = [1.0, 0.2, 2.0]
    models = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(llamas, weights, strict=False)
    ]
    merged = merge(models)
    assert is_cart(merged, inputs[:3], QUERY.format(0), 2, weights=weights)
    assert is_average(merged, inputs[:3], "lm_head.weight", weights)


def test_slices_take_layers_from_where_they_say(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    def sources(first: int, last: int) -> list[dict[str, Any]]:
        return [{"model": model, "layer_range": [first, last]} for model in llamas[:3]]

    shifted = sources(1, 2)
    shifted[2]["layer_range"] = [3, 4]
    merged = merge(
        None,
        slices=[
            {"sources": sources(0, 2), "parameters": {"rank": 4}},
            {"sources": shifted, "parameters": {"rank": 1, "lambda": 3.0}},
        ],
    )
    assert is_cart(merged, inputs[:3], QUERY.format(1), 4)
    tensors = [inputs[i][QUERY.format(layer)] for i, layer in ((0, 1), (1, 1), (2, 3))]
    expected = cart_formula(tensors, 1, scale=3.0)
    assert relative_error(merged[QUERY.format(2)], expected) <= 1e-5
    assert QUERY.format(3) not in merged


def test_dtype_and_out_dtype(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    brain = merge(llamas, dtype="bfloat16")
    assert {tensor.dtype for tensor in brain.values()} == {torch.bfloat16}
    assert is_cart(brain, inputs, QUERY.format(1), 2)
    cast = merge(llamas, dtype="float32", out_dtype="bfloat16")
    exact = merge(llamas)
    for name, tensor in exact.items():
        assert torch.equal(cast[name], tensor.to(torch.bfloat16))


def test_half_precision_checkpoints_stay_so(merge: Callable[..., Tensors], own: list[str]) -> None:
    for folder in own:
        edit(folder, lambda tensors: {k: v.to(torch.float16) for k, v in tensors.items()})
    merged = merge(own)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    halves = [load_tensors(folder) for folder in own]
    assert is_cart(merged, halves, QUERY.format(0), 2)


def test_a_base_that_is_given_but_not_used_changes_nothing(
    merge: Callable[..., Tensors], llamas: list[str]
) -> None:
    without = merge(llamas[:4])
    implicit = merge(llamas[:4], base_model=llamas[4])
    listed = merge([llamas[4], *llamas[:4]], base_model=llamas[4])
    for name, tensor in without.items():
        assert torch.equal(implicit[name], tensor), name
        assert torch.equal(listed[name], tensor), name


def test_center_base_starts_at_the_base_and_averages_the_rest(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    parameters = {"center": "base", "rank": 4, "lambda": 0.3}
    merged = merge(llamas[:3], base_model=llamas[4], parameters=parameters)
    name = DOWN.format(2)
    assert is_cart(merged, inputs[:3], name, 4, scale=0.3, base=inputs[4])
    assert is_average(merged, inputs[:3], "model.norm.weight")


RECIPES_OF_OTHERS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"parameters": {"lambda": 0.9, "normalize": False}},
    "ties": {"parameters": {"normalize": True, "int8_mask": True}},
    "dare_ties": {"parameters": {"normalize": True, "rescale": True}},
    "dare_linear": {},
    "della": {"parameters": {"epsilon": 0.1}},
    "breadcrumbs": {"parameters": {"gamma": 0.01}},
    "sce": {"parameters": {"select_topk": 0.5}},
    "linear": {"parameters": {"normalize": True}},
    "model_stock": {"parameters": {"filter_wise": False}},
}


@pytest.mark.parametrize("method", RECIPES_OF_OTHERS)
def test_a_recipe_of_another_method_works_when_only_the_method_changes(
    method: str, merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weights = [0.5, 0.3, 0.3]
    models = [
        {"model": model, "parameters": {"weight": weight, "density": 0.6}}
        for model, weight in zip(llamas, weights, strict=False)
    ]
    recipe = {"dtype": "float32", **RECIPES_OF_OTHERS[method]}
    if method != "linear":
        recipe["base_model"] = llamas[4]
    other = merge(models, merge_method=method, **recipe)
    merged = merge(models, merge_method="cart", **recipe)
    assert merged.keys() == other.keys()
    scale = recipe.get("parameters", {}).get("lambda", 1.0)
    name = QUERY.format(3)
    assert is_cart(merged, inputs[:3], name, 2, scale=scale, weights=weights)
    assert not torch.equal(merged[name], other[name])


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


def test_center_base_needs_the_base_to_have_every_tensor(t5s: list[str], tmp_path: Path) -> None:
    tensor = random(32, 2)
    for model in t5s:
        put(model, OPTIONAL, tensor)
    base = small_t5(tmp_path / "base", 9)
    message = f"tensor '{OPTIONAL}': center is 'base' but there is no base model"
    fails(tmp_path, t5s, message, base_model=base, parameters={"center": "base"})


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


@pytest.mark.parametrize(
    "options",
    [
        {"async_write": True, "write_threads": 2},
        {"low_cpu_memory": True},
        {"clone_tensors": True, "out_shard_size": 20_000},
        {"lazy_unpickle": True},
        {"device": "auto", "read_to_gpu": False},
    ],
    ids=repr,
)
def test_options_of_mergekit_do_not_change_the_result(
    options: dict[str, Any], merge: Callable[..., Tensors], llamas: list[str]
) -> None:
    expected = merge(llamas)
    merged = merge(llamas, options)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_two_models_are_averaged_with_a_warning(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = merge(llamas[:2])
    assert all(is_average(merged, inputs[:2], name) for name in merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        merge(llamas[:3])


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


# --- bad input, to the exit code ---------------------------------------------------------------


def invoke(command: Any, tmp_path: Path, models: list[str], *options: str, **recipe: Any) -> Result:
    """Run a command of mergekit on a recipe, into a folder `out`, in this process."""
    file = write_recipe(tmp_path / "recipe.yaml", models, **recipe)
    out = tmp_path / "out"
    return CliRunner().invoke(command, [str(file), str(out), *options])


def looks_finished(folder: Path) -> bool:
    """Whether somebody might take a folder for a merged model."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    index = [*folder.glob("*.index.json")]
    return (folder / "config.json").exists() or bool(weights and index) or len(weights) == 1


def fails(tmp_path: Path, models: list[str], *parts: str, **recipe: Any) -> None:
    """Assert that a recipe ends with exit code 1, a message, and nothing that looks whole."""
    result = invoke(run_yaml.main, tmp_path, models, *QUIET, **recipe)
    assert result.exit_code == 1
    for part in parts:
        assert part in str(result.exception)
    assert not looks_finished(tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_end_the_merge(
    value: float, own: list[str], tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[DOWN.format(4)][3, 3] = value

    edit(own[1], spoil)
    where = f"tensor '{DOWN.format(4)}' of {own[1]} holds 1 NaN or infinite values out of 2048"
    fails(tmp_path, own, where)


def test_shapes_that_differ_end_the_merge(own: list[str], tmp_path: Path) -> None:
    put(own[1], DOWN.format(1), torch.ones(HIDDEN, 65))
    fails(tmp_path, own, f"Tensor size mismatch for {DOWN.format(1)}", "(32, 64), (32, 65)")


def test_vocabularies_that_differ_end_the_merge(own: list[str], tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"
    put(own[2], table, torch.ones(70, HIDDEN))
    fails(tmp_path, own, f"Tensor size mismatch for {table}", "tokenizer")


def test_a_missing_tensor_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors[QUERY.format(2)]

    edit(own[1], drop)
    fails(tmp_path, own, f"Tensor {QUERY.format(2)} required but not present", own[1])


def test_a_truncated_file_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    file = Path(own[1]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    fails(tmp_path, own)


def test_integer_weights_end_the_merge(own: list[str], tmp_path: Path) -> None:
    for index, folder in enumerate(own):
        integers = torch.full((HIDDEN, HIDDEN), index, dtype=torch.int8)
        put(folder, QUERY.format(1), integers)
    fails(tmp_path, own, QUERY.format(1), "differs between inputs")


def test_one_model_ends_the_merge(llamas: list[str], tmp_path: Path) -> None:
    message = "cart needs at least two fine-tuned models beside the base model"
    fails(tmp_path, llamas[:1], message, f"got 1: {llamas[0]}")
    fails(tmp_path, llamas[:1], message, f"got 1: {llamas[0]}", base_model=llamas[1])
    fails(tmp_path, llamas[:2], message, f"got 1: {llamas[1]}", base_model=llamas[0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": "abc"}, "rank_ratio must be a number, got 'abc'"),
        ({"rank_ratio": [0.1, 2]}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank": 4, "energy": 0.9}, "rank=4 and energy=0.9 are two rank rules at once"),
        ({"center": "base"}, "center is 'base' but there is no base model"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, got 'quick'"),
        ({"lambda": "much"}, "lambda must be a number, got 'much'"),
        ({"weight": 0}, "weights must sum to more than 0, got [0.0, 0.0, 0.0]"),
        ({"weight": "some"}, "weight must be a number, got 'some'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
    ids=repr,
)
def test_bad_parameters_end_the_merge(
    parameters: dict[str, Any], message: str, llamas: list[str], tmp_path: Path
) -> None:
    fails(tmp_path, llamas[:3], message, parameters=parameters)


def test_parameters_are_checked_before_anything_is_merged(
    llamas: list[str], tmp_path: Path
) -> None:
    last = QUERY.format(LAYERS - 1)
    for name, value in (("rank_ratio", 2), ("lambda", "x"), ("svd", "quick"), ("rank", -1)):
        parameters = {name: [{"filter": last, "value": value}]}
        fails(tmp_path, llamas[:3], name, parameters=parameters)
        assert not (tmp_path / "out").exists()


def test_an_unknown_method_beside_ours_ends_the_merge(llamas: list[str], tmp_path: Path) -> None:
    fails(tmp_path, llamas[:3], "carrt", merge_method="carrt")


def test_a_result_beyond_half_precision_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    for index, folder in enumerate(own):
        large = (6e4 * random(HIDDEN, HIDDEN, seed=index).sign()).half()
        put(folder, QUERY.format(0), large)
    message = "the merged values leave the range of torch.float16"
    fails(tmp_path, own, message, QUERY.format(0), parameters={"lambda": 9.0})


def test_a_failed_merge_leaves_no_finished_folder_even_with_small_shards(
    own: list[str], tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[QUERY.format(LAYERS - 1)][0, 0] = math.nan

    edit(own[0], spoil)
    result = invoke(run_yaml.main, tmp_path, own, "--out-shard-size", "20K", "--async-write")
    assert result.exit_code == 1
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.index.json"))


# --- the other commands ------------------------------------------------------------------------


def test_flat_files_are_merged_by_mergekit_pytorch(tmp_path: Path) -> None:
    files, inputs = [], []
    for seed in range(3):
        tensors = {
            "visual.transformer.resblocks.0.attn.in_proj_weight": random(24, 8, seed=seed),
            "visual.conv1.weight": random(8, 3, 4, 4, seed=seed + 10),
            "visual.positional_embedding": random(5, 8, seed=seed + 20),
            "num_batches_tracked": torch.tensor(4),
        }
        files.append(str(tmp_path / f"{seed}.safetensors"))
        inputs.append(tensors)
        save_file(tensors, files[-1])
    result = invoke(merge_raw_pytorch.main, tmp_path, files, parameters={"rank": 2})
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert merged.keys() == inputs[0].keys()
    assert is_cart(merged, inputs, "visual.transformer.resblocks.0.attn.in_proj_weight", 2)
    kernels = [tensors["visual.conv1.weight"].reshape(8, -1) for tensors in inputs]
    expected = cart_formula(kernels, 2).reshape(8, 3, 4, 4)
    assert relative_error(merged["visual.conv1.weight"], expected) <= 1e-5
    assert is_average(merged, inputs, "visual.positional_embedding")
    assert merged["num_batches_tracked"] == 4


def test_one_flat_file_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "one.safetensors")
    save_file({"fc.weight": random(4, 5)}, file)
    result = invoke(merge_raw_pytorch.main, tmp_path, [file])
    assert result.exit_code == 1
    assert "cart needs at least two fine-tuned models" in str(result.exception)


def test_legacy_command_merges(llamas: list[str], inputs: list[Tensors], tmp_path: Path) -> None:
    merges = [option for model in llamas[:3] for option in ("--merge", model)]
    weights = [option for weight in ("1", "2", "3") for option in ("--weight", weight)]
    out = tmp_path / "out"
    result = CliRunner().invoke(
        legacy.main, [str(out), *merges, *weights, "--method", "cart", *QUIET]
    )
    assert result.exit_code == 0, result.output
    assert is_cart(load_tensors(out), inputs[:3], QUERY.format(0), 2, weights=[1.0, 2.0, 3.0])


def test_multi_command_chains_merges(
    llamas: list[str], inputs: list[Tensors], tmp_path: Path
) -> None:
    first = {"name": "first", "merge_method": "cart", "models": [{"model": m} for m in llamas[:3]]}
    last = {
        "merge_method": "cart",
        "parameters": {"rank": 5},
        "models": [{"model": model} for model in ["first", *llamas[3:]]],
    }
    file = tmp_path / "multi.yaml"
    file.write_text(yaml.safe_dump_all([first, last]))
    out, between = tmp_path / "out", tmp_path / "between"
    arguments = [str(file), "--out-path", str(out), "--intermediate-dir", str(between)]
    result = CliRunner().invoke(multimerge.main, [*arguments, *QUIET])
    assert result.exit_code == 0, result.output
    merged = load_tensors(between / "first")
    assert is_cart(merged, inputs[:3], QUERY.format(0), 2)
    assert is_cart(load_tensors(out), [merged, *inputs[3:]], QUERY.format(0), 5)


def execute(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run an executable that was installed beside this Python."""
    name, *rest = map(str, arguments)
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    assert program is not None, f"{name} is not installed beside {sys.executable}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run([program, *rest], capture_output=True, text=True, env=environment)


@pytest.fixture
def krylov_recipe(tmp_path: Path) -> Path:
    """A recipe that is solved from a random start."""
    shape = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
    models = save_models(tmp_path, "llama", 3, **shape)
    for seed, model in enumerate(models):
        put(model, QUERY.format(0), with_spectrum(power_law(128, 1), 128, 128, seed=10 * seed))
    queries = torch.stack([load_tensors(model)[QUERY.format(0)] for model in models])
    assert leading_subspace(queries - queries.mean(0), 3, tolerance=5e-4, seed=0) is not None
    parameters = {"svd": "fast", "rank": 3}
    return write_recipe(tmp_path / "krylov.yaml", models, parameters=parameters)


def test_the_executable_gives_the_same_bytes_as_this_process_whatever_the_hash_seed(
    krylov_recipe: Path, tmp_path: Path
) -> None:
    run(krylov_recipe, tmp_path / "here")
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    arguments = ["mergekit-yaml", krylov_recipe, tmp_path / "there", "-j", "1", *QUIET]
    done = execute(*arguments, PYTHONHASHSEED=other)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "config.json").is_file()
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_the_executable_says_on_stderr_what_is_wrong(own: list[str], tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[QUERY.format(0)][0, 0] = math.nan

    edit(own[2], spoil)
    recipe = write_recipe(tmp_path / "recipe.yaml", own)
    done = execute("mergekit-yaml", recipe, tmp_path / "out", *QUIET)
    assert done.returncode == 1
    assert f"tensor '{QUERY.format(0)}' of {own[2]} holds 1 NaN" in done.stderr
    assert not looks_finished(tmp_path / "out")


def test_two_runs_in_one_process_give_the_same_bytes(krylov_recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(krylov_recipe, tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_the_seed_is_a_parameter_of_the_recipe(krylov_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(krylov_recipe.read_text())
    recipe["parameters"]["seed"] = 1
    run(krylov_recipe, tmp_path / "one")
    run(write_recipe(tmp_path / "other.yaml", [], **recipe), tmp_path / "two")
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["-j", "2"], ["--low-cpu-memory"], ["--async-write", "--write-threads", "2"]],
    ids=" ".join,
)
def test_the_executable_works_with_options(
    options: list[str], llamas: list[str], inputs: list[Tensors], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", llamas)
    done = execute("mergekit-yaml", recipe, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    merged = load_tensors(tmp_path / "out")
    assert is_cart(merged, inputs, QUERY.format(1), 2)


@pytest.mark.slow
def test_the_other_executables_merge(llamas: list[str], tmp_path: Path) -> None:
    files = [f"{model}/model.safetensors" for model in llamas[:3]]
    flat = write_recipe(tmp_path / "flat.yaml", files)
    multi = write_recipe(tmp_path / "multi.yaml", llamas[:3], name="merged")
    merges = [f"--merge={model}" for model in llamas[:3]]
    for arguments, out in (
        (["mergekit-pytorch", flat, tmp_path / "flat"], "flat"),
        (["mergekit-legacy", tmp_path / "legacy", *merges, "--method=cart"], "legacy"),
        (["mergekit-multi", multi, "--intermediate-dir", tmp_path / "multi"], "multi/merged"),
    ):
        done = execute(*arguments)
        assert done.returncode == 0, done.stderr
        assert load_tensors(tmp_path / out).keys() == load_tensors(llamas[0]).keys()


# --- mergekit's own methods --------------------------------------------------------------------

# Runs every method in one process, with the plugin or as if it were not installed.
OTHER_METHODS = """
import hashlib, json, sys
if sys.argv[1] == "without":
    hooks = [f for f in sys.meta_path if type(f).__module__.startswith("cart_plugin")]
    assert hooks, "the plugin's hook is not there to begin with"
    sys.meta_path[:] = [f for f in sys.meta_path if f not in hooks]
import torch
from mergekit import merge_methods
names = sorted(method.spec.name for method in merge_methods.registered_methods())
assert ("cart" in names) == (sys.argv[1] == "with"), names
assert ("cart_plugin.mergekit" in sys.modules) == (sys.argv[1] == "with")
models = [
    {
        "model.embed_tokens.weight": torch.randn(9, 8, generator=g),
        "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8, generator=g),
        "model.norm.weight": torch.randn(8, generator=g),
    }
    for g in [torch.Generator().manual_seed(seed) for seed in range(4)]
]
results = {}
for name in names:
    for count in (1, 2, 3, 4):
        for base in (None, 0):
            spec = merge_methods.get(name).spec
            required = [p for p in spec.parameters if p.required]
            parameters = {p.name: 0.4 for p in required}
            if any(p.name == "density" for p in spec.parameters):
                parameters["density"] = 0.5
            torch.manual_seed(3)
            try:
                merged = merge_methods.merge_state_dicts(
                    models[:count], name, base=base, parameters=parameters
                )
            except Exception as error:
                results[f"{name} {count} {base}"] = type(error).__name__ + str(error)
                continue
            state = b"".join(tensor.contiguous().numpy().tobytes() for tensor in merged.values())
            results[f"{name} {count} {base}"] = hashlib.sha256(state).hexdigest()
print(json.dumps(results))
"""


def test_other_methods_give_the_same_bytes_with_and_without_the_plugin() -> None:
    found = []
    for how in ("with", "without"):
        done = execute("python", "-c", OTHER_METHODS, how)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    with_plugin, without = found
    ours = {key for key in with_plugin if key.startswith("cart ")}
    assert len(ours) == 8
    assert {key: value for key, value in with_plugin.items() if key not in ours} == without
    succeeded = {key.split()[0] for key, value in without.items() if len(value) == 64}
    assert succeeded >= {"linear", "ties", "dare_ties", "slerp", "sce", "model_stock"}


def test_nothing_is_logged_or_printed_by_the_method(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        methods.merge_tensors(matrices(), "cart")
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")
