"""Every recipe that people copy is merged by mergekit, on tiny models of its architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.mergekit import register
from tests.doctor.tiny import load_tensors, save_model, save_models

RECIPES = Path(__file__).parents[2] / "configs" / "mergekit"
register()

Tensors = dict[str, torch.Tensor]


class Merged:
    """The result of a recipe and the inputs it was made from, in recipe order."""

    def __init__(self, result: Path, inputs: list[str], recipe: dict[str, Any]) -> None:
        self.folder = result
        self.tensors = load_tensors(result)
        self.inputs = [load_tensors(folder) for folder in inputs]
        self.recipe = recipe

    def mean(self, name: str, weights: list[float] | None = None) -> torch.Tensor:
        weights = weights or [1.0] * len(self.inputs)
        total = sum(
            w * tensors[name].double() for w, tensors in zip(weights, self.inputs, strict=True)
        )
        return total / sum(weights)  # type: ignore[operator]

    def is_average(self, name: str, weights: list[float] | None = None) -> bool:
        merged = self.tensors[name]
        tolerance = 1e-2 if merged.dtype == torch.bfloat16 else 1e-6
        return torch.allclose(merged.double(), self.mean(name, weights), atol=tolerance, rtol=0.01)

    def formula(
        self, stacked: list[torch.Tensor], ratio: float, scale: float, weights: list[float]
    ) -> torch.Tensor:
        """CART of one matrix, in double precision."""
        matrices = [matrix.double() for matrix in stacked]
        centre = sum(w * matrix for w, matrix in zip(weights, matrices, strict=True)) / sum(weights)
        mean_weight = sum(weights) / len(weights)
        merged = centre.clone()
        for weight, matrix in zip(weights, matrices, strict=True):
            u, s, vh = torch.linalg.svd(matrix - centre, full_matrices=False)
            k = max(1, math.floor(ratio * len(s)))
            merged += scale * weight / mean_weight * (u[:, :k] * s[:k]) @ vh[:k]
        return merged

    def follows(
        self, name: str, ratio: float, scale: float, weights: list[float] | None = None
    ) -> bool:
        stacked = [tensors[name] for tensors in self.inputs]
        weights = weights or [1.0] * len(stacked)
        expected = self.formula(stacked, ratio, scale, weights)
        merged = self.tensors[name]
        tolerance = 1e-2 if merged.dtype == torch.bfloat16 else 1e-5
        return float((merged.double() - expected).norm() / expected.norm()) < tolerance


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Merged]:
    def merge(
        recipe_name: str, models: list[str], base: str | None = None, **changes: Any
    ) -> Merged:
        """Merge a recipe with its models, in order, replaced by local ones."""
        recipe = yaml.safe_load((RECIPES / recipe_name).read_text(encoding="utf-8")) | changes
        assert len(recipe["models"]) == len(models)
        for entry, model in zip(recipe["models"], models, strict=True):
            entry["model"] = model
        if "base_model" in recipe:
            recipe["base_model"] = base
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "merged"), options)
        return Merged(tmp_path / "merged", models, recipe)

    return merge


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid_and_says_how_to_run_it(recipe: str) -> None:
    text = (RECIPES / recipe).read_text(encoding="utf-8")
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.merge_method == ("cart_auto" if recipe == "auto.yaml" else "cart")
    assert len(config.models or ()) >= 3
    assert f"mergekit-yaml configs/mergekit/{recipe} " in text
    assert f"mergekit-cart doctor configs/mergekit/{recipe}" in text


def test_minimal_merges_all_matrices_at_the_defaults(
    merge: Callable[..., Merged], tmp_path: Path
) -> None:
    merged = merge("minimal.yaml", save_models(tmp_path, "llama"))
    assert set(merged.tensors) == set(merged.inputs[0])
    assert merged.follows("model.layers.2.self_attn.q_proj.weight", 0.08, 1.0)
    assert not merged.is_average("model.layers.2.self_attn.q_proj.weight")
    for averaged in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert merged.is_average(averaged)


def test_auto_merges_all_matrices_without_a_setting(
    merge: Callable[..., Merged], tmp_path: Path
) -> None:
    *models, base = save_models(tmp_path, "llama", count=4)
    merged = merge("auto.yaml", models, base=base)
    name = "model.layers.2.self_attn.q_proj.weight"
    *stacked, start = [tensors[name].float() for tensors in [*merged.inputs, load_tensors(base)]]
    expected = merge_tensors(stacked, CartSettings(lambda_="auto"), base=start, name=name)
    assert torch.allclose(merged.tensors[name].float(), expected, rtol=1e-2, atol=1e-3)
    assert not merged.is_average(name)
    assert merged.is_average("lm_head.weight")


def test_filters_and_gradients_average_the_ends_and_rank_attention_above_mlp(
    merge: Callable[..., Merged], tmp_path: Path
) -> None:
    merged = merge("filters_and_gradients.yaml", save_models(tmp_path, "llama"))
    assert set(merged.tensors) == set(merged.inputs[0])
    for layer in (0, 4):
        assert merged.is_average(f"model.layers.{layer}.self_attn.q_proj.weight")
        assert merged.is_average(f"model.layers.{layer}.mlp.up_proj.weight", [1, 0.5, 1])
    # 32 rows: 16 % are 5 directions, 6 % are 1
    assert merged.follows("model.layers.2.self_attn.q_proj.weight", 5 / 32, 1.5)
    assert merged.follows("model.layers.2.mlp.up_proj.weight", 1 / 32, 1.5, [1, 0.5, 1])
    assert merged.follows("model.layers.2.mlp.down_proj.weight", 1 / 32, 1.0, [1, 0.5, 1])
    assert merged.is_average("lm_head.weight")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_llm_keeps_bfloat16_and_the_base_models_tokenizer(
    architecture: str, merge: Callable[..., Merged], tmp_path: Path
) -> None:
    models = save_models(tmp_path, architecture, 5)
    for model in models:
        save_tokenizer(model)
    merged = merge("llm_llama_qwen.yaml", models[:4], base=models[4])
    assert set(merged.tensors) == set(merged.inputs[0])
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
    assert merged.follows("model.layers.2.mlp.gate_proj.weight", 0.08, 1.0)
    assert merged.is_average("model.embed_tokens.weight")
    assert (merged.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("bert-classifier", "bert"), ("roberta-classifier", "roberta")]
)
def test_encoders_are_merged_and_their_heads_put_back(
    architecture: str, prefix: str, merge: Callable[..., Merged], tmp_path: Path
) -> None:
    labels = (3, 2, 4, 2)
    tuned, prepared = [], []
    for seed, number in enumerate(labels):
        folder = save_model(tmp_path / f"tuned-{seed}", architecture, seed, num_labels=number)
        # the preparation that the recipe describes
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, ignore_mismatched_sizes=True
        )
        model.save_pretrained(tmp_path / f"prepared-{seed}")
        tuned.append(folder)
        prepared.append(str(tmp_path / f"prepared-{seed}"))

    merged = merge("bert_roberta.yaml", prepared)
    assert set(merged.tensors) == set(merged.inputs[0])
    layer = f"{prefix}.encoder.layer.1.attention.self.query.weight"
    assert merged.follows(layer, 0.04, 1.6)
    head = next(name for name in merged.tensors if name.startswith("classifier"))
    assert merged.is_average(head)
    assert merged.is_average(f"{prefix}.embeddings.position_embeddings.weight")

    whole = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    task = AutoModelForSequenceClassification.from_pretrained(tuned[2])
    task.base_model.load_state_dict(whole.base_model.state_dict())
    logits = task(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
    assert logits.shape == (1, 4)
    assert torch.isfinite(logits).all()


def test_clip_vision_decomposes_attention_and_mlp_only(
    merge: Callable[..., Merged], tmp_path: Path
) -> None:
    merged = merge("clip_vision.yaml", save_models(tmp_path, "clip-vision", 8))
    assert set(merged.tensors) == set(merged.inputs[0])
    layer = next(name for name in merged.tensors if name.endswith("layers.1.mlp.fc1.weight"))
    assert merged.follows(layer, 0.12, 2.0)
    for name in merged.tensors:
        decomposed = name.endswith("weight") and ("self_attn" in name or "mlp" in name)
        assert merged.is_average(name) != decomposed, name


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral"])
def test_moe_decomposes_each_expert_and_averages_the_router(
    architecture: str, merge: Callable[..., Merged], tmp_path: Path
) -> None:
    # saved by transformers 5 as it works with them: experts stacked, under the names of the result
    models = save_models(tmp_path, architecture, original_format=False)
    merged = merge("moe.yaml", models, dtype="float32")
    assert set(merged.tensors) == set(merged.inputs[0])
    assert merged.is_average("model.layers.0.mlp.gate.weight")
    assert merged.follows("model.layers.0.self_attn.q_proj.weight", 0.08, 1.0)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for expert in range(4):
        stacked = [tensors[name][expert] for tensors in merged.inputs]
        expected = merged.formula(stacked, 0.12, 1.0, [1.0] * 3)
        assert torch.allclose(merged.tensors[name][expert].double(), expected, atol=1e-6)
    _, loading = AutoModelForCausalLM.from_pretrained(merged.folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral"])
def test_moe_files_with_single_experts_give_the_same_result(
    architecture: str, merge: Callable[..., Merged], tmp_path: Path
) -> None:
    stacked = merge(
        "moe.yaml", save_models(tmp_path / "stacked", architecture, original_format=False)
    )
    single = merge("moe.yaml", save_models(tmp_path / "single", architecture))
    assert stacked.tensors.keys() == single.tensors.keys()
    for name, tensor in stacked.tensors.items():
        assert torch.equal(tensor, single.tensors[name]), name


def save_tokenizer(folder: str) -> None:
    """Save a tokenizer of as many words as the tiny models have rows."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<unk>": 0, **{f"word{number}": number for number in range(1, 64)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
