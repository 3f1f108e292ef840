"""What doctor says about the merge that mergekit plans for a recipe's models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from cart_plugin.doctor import costs
from tests.doctor.conftest import Report
from tests.doctor.tiny import edit_weights, load_tensors, save_model, save_tokenizer

# Whether they fit together


def test_shapes_that_differ(check: Callable[..., Report], tmp_path: Path) -> None:
    models = [
        str(save_model(tmp_path / f"{labels}", "bert-classifier", labels, num_labels=labels))
        for labels in (2, 3, 4)
    ]
    report = check(models)
    report.has_only_problem(
        "the shapes of 2 tensors differ", f"(3,) in {models[1]}", "leave heads of different sizes"
    )


def test_vocabularies_that_differ(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, vocab_size=70))
    models = [*own_llamas[:2], other]
    check(models).has_only_problem("the shapes of 2 tensors differ", "tokenizer: {source: union}")
    for folder in models:
        save_tokenizer(folder, 64)
    check(models, tokenizer={"source": "union"}).is_clean()


def test_depths_that_differ(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, num_hidden_layers=2))
    report = check([*llamas[:2], other])
    report.has_only_problem("cannot plan", "same number of layers", "compare their config.json")


def test_architectures_that_differ(
    check: Callable[..., Report], llamas: list[str], saved: Callable[..., list[str]]
) -> None:
    report = check([*llamas[:2], saved("qwen2")[0]])
    report.has_only_problem("cannot plan", "one architecture")


def test_tensor_missing_in_one_model(check: Callable[..., Report], own_llamas: list[str]) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    report = check(own_llamas)
    report.has_only_problem(
        f"model {own_llamas[1]} lacks 1 tensor (model.layers.1.mlp.up_proj.weight) that others have"
    )


def test_optional_tensor_missing_in_one_model(
    check: Callable[..., Report], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    models = saved("dinov2", original_format=False)
    other = str(shutil.copytree(models[0], tmp_path / "other"))
    edit_weights(other, lambda tensors: tensors.pop("embeddings.mask_token"))
    report = check([*models[1:], other])
    report.has_only_warning(f"model {other} lacks 1 tensor (embeddings.mask_token)", "from those")


def test_tensors_that_only_one_model_has(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    check(own_llamas).has_only_warning("1 tensor of the models will not", "score.weight")


def test_buffers_of_old_checkpoints_are_no_loss(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder in own_llamas:
        edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    check(own_llamas).is_clean()


# Whether mergekit keeps all of them


@pytest.mark.parametrize(("architecture", "dropped"), [("vit", 32), ("dinov2", 16)])
def test_tensors_that_mergekit_would_drop(
    architecture: str,
    dropped: int,
    check: Callable[..., Report],
    saved: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    models = saved(architecture)
    report = check(models)
    total = len(load_tensors(models[0]))
    report.has_only_problem(
        f"would silently drop {dropped} of {total} tensors",
        "save_original_format=False",
        "mergekit-cart merge",
    )
    # and so it does
    config = {"merge_method": "cart", "models": [{"model": model} for model in models]}
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), options)
    assert len(load_tensors(tmp_path / "out")) == total - dropped

    check(saved(architecture, original_format=False)).is_clean()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_encoders_that_mergekit_cannot_merge_have_a_way_out(
    architecture: str, check: Callable[..., Report], saved: Callable[..., list[str]]
) -> None:
    models = saved(architecture)
    report = check(models)
    assert len(report.problems) == 1
    assert "with a head" in report.problems[0] or "with their head" in report.problems[0]
    assert "mergekit-cart merge" in report.problems[0]

    check(saved(f"{architecture}-classifier")).is_clean()
    files = [f"{model}/model.safetensors" for model in models]
    report = check(files)
    report.is_clean()
    assert "valid for mergekit-pytorch" in report.text
    assert "13 decomposed, 26 averaged" in report.text


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral"])
def test_experts_are_counted_as_mergekit_stacks_them(
    architecture: str,
    original_format: bool,
    check: Callable[..., Report],
    saved: Callable[..., list[str]],
) -> None:
    report = check(saved(architecture, original_format=original_format))
    report.is_clean()
    # per layer four attention matrices, the router, and two stacks of experts
    assert "14 decomposed" in report.text


def test_slices_do_not_lose_the_layers_they_leave_out(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    sources = [{"model": model, "layer_range": [1, 3]} for model in llamas]
    last = [{"model": model, "layer_range": [4, 5]} for model in llamas]
    report = check([], models=None, slices=[{"sources": sources}, {"sources": last}])
    report.is_clean()
    assert "30 tensors: 21 decomposed" in report.text


# How many models count


def weighted(models: list[str], *weights: object) -> dict[str, Any]:
    """A recipe's `models` with these weights."""
    entries = zip(models, weights, strict=True)
    return {"models": [{"model": m, "parameters": {"weight": w}} for m, w in entries]}


def test_weights_of_zero_that_leave_two_models(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    check(llamas, **weighted(llamas, 1, 0.5, 0)).has_only_warning(
        "leave fewer than three models for 35 tensors", "plain averaging", "not 0"
    )
    check(llamas, **weighted(llamas, 1, 0.5, 0.01)).is_clean()


def test_weights_of_zero_through_filters_and_gradients(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    mlp = [{"filter": "mlp", "value": 0}, {"value": 1}]
    check(llamas, **weighted(llamas, 1, 1, mlp)).has_only_warning("models for 15 tensors", "mlp")
    first_layer = [0, 1, 1, 1, 1]
    report = check(llamas, **weighted(llamas, 1, 1, first_layer))
    report.has_only_warning("models for 7 tensors", "layers.0.")
    norms = [{"filter": "norm", "value": 0}, {"value": 1}]
    check(llamas, **weighted(llamas, 1, 1, norms)).is_clean()  # averaged anyway


def test_weights_of_zero_where_two_models_are_enough(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = [*llamas, str(save_model(tmp_path / "other", "llama", 9))]
    check(models, **weighted(models, 1, 1, 0, 1)).is_clean()
    base = {"base_model": models[3], "parameters": {"center": "base"}}
    check(llamas, **weighted(llamas, 1, 1, 0), **base).is_clean()
    auto = {"base_model": models[3], "merge_method": "cart_auto"}
    check(llamas, **weighted(llamas, 1, 1, 0), **auto).is_clean()


def test_what_becomes_of_the_base_is_said(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    more = [str(save_model(tmp_path / str(seed), "llama", seed)) for seed in range(20, 23)]
    auto = {"base_model": more[0], "merge_method": "cart_auto"}
    shows = "the base model shows where the tasks' inputs lie in "
    for models in (llamas[:2], llamas):
        text = check(models, **auto).text
        assert shows in text
        assert "the base model is not used" not in text
    text = check([*llamas, *more[1:]], **auto).text
    assert "only asked whether adapters have made the models: five and more merge better" in text
    assert shows not in text
    text = check(llamas, **auto, parameters={"center": "average"}).text
    assert "the base model is not used" in text
    for other in ({"merge_method": "cart_auto"}, {**auto, "merge_method": "cart"}):
        text = check(llamas, **other).text
        assert "the base model" not in text


# mergekit-pytorch


def test_weight_files_with_different_tensors(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors.pop("lm_head.weight"))
    report = check([f"{model}/model.safetensors" for model in own_llamas])
    report.has_only_problem("lacks 1 tensor (lm_head.weight)", "--tensor-intersection")


def test_folder_among_the_weight_files(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check([f"{llamas[0]}/model.safetensors", llamas[1], llamas[2]])
    assert len(report.problems) == 2
    assert f"write {llamas[1]}/model.safetensors" in report.problems[0]


# What the merge needs


def test_too_little_disk_space(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    check(llamas).has_only_problem("disk needed: 202 KB", "1 KB", "another file system")
    check(llamas, out_dtype="bfloat16").has_only_problem("disk needed: 101 KB")


def test_too_little_memory(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "available_memory", lambda: 10**6)
    check(llamas).has_only_warning("memory needed on the CPU: up to about 45", "close other prog")
    monkeypatch.setattr(costs, "available_memory", lambda: None)
    check(llamas).is_clean()


@pytest.mark.parametrize(
    ("parameters", "most", "name"),
    [
        # A result of 202 KB; of the largest matrix, 8 KB in fp32, the three inputs and copies.
        ({"rank_ratio": 0.08}, "276 KB", "mlp"),
        ({"rank_ratio": 0.125}, "276 KB", "mlp"),
        ({"rank": 4}, "276 KB", "mlp"),
        ({"rank_ratio": 0.16}, "333 KB", "mlp"),
        ({"rank": 5}, "333 KB", "mlp"),
        ({"energy": 0.1}, "333 KB", "mlp"),
        ({"rank_ratio": 0}, "243 KB", "embed_tokens"),
    ],
)
def test_memory_depends_on_the_share_of_the_full_rank(
    parameters: dict[str, float],
    most: str,
    name: str,
    check: Callable[..., Report],
    llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "PROGRAM_BYTES", 0)
    (line,) = [
        line
        for line in check(llamas, parameters=parameters).text.splitlines()
        if "memory n" in line
    ]
    assert f"up to about {most}" in line
    assert name in line


def test_small_differences_are_side_by_side_on_several_threads(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 2)
    # Six copies of 8 KB once more than above; of three differences two are in the works.
    assert "up to about 325 KB" in check(llamas, parameters={"rank_ratio": 0.08}).text
    monkeypatch.setattr(costs, "SIDE_BY_SIDE", 1)
    assert "up to about 276 KB" in check(llamas, parameters={"rank_ratio": 0.08}).text


def test_matrices_of_a_large_stack_are_side_by_side_on_several_threads(
    check: Callable[..., Report],
    saved: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "PROGRAM_BYTES", 0)

    def needed() -> int:
        text = check(saved("qwen3-moe")).text
        found = re.search(r"up to about (\d+) KB; most for .*experts", text)
        assert found
        return int(found[1])

    alone = needed()
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(costs, "SIDE_BY_SIDE", 2 * 48 * 32)  # two of a stack's four matrices
    # Of six copies of 4 x 48 x 32 numbers a fourth comes to them.
    assert needed() - alone == pytest.approx(6 * 4 * 48 * 32 / 1000, abs=1)


def test_cart_auto_holds_all_models_factors(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "PROGRAM_BYTES", 0)
    report = check(llamas, merge_method="cart_auto", parameters={})
    # As with rank_ratio 0.16, and 3 models' 5 directions of an MLP's 64 + 32, twice, with 15 by 15.
    assert "up to about 347 KB" in report.text


def test_doctor_changes_no_file_and_writes_none(
    check: Callable[..., Report],
    own_llamas: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    check(own_llamas)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = state()
    check(own_llamas)
    recipe = tmp_path / "cart.yaml"
    assert {path: time for path, time in state().items() if path != recipe} == {
        path: time for path, time in before.items() if path != recipe
    }


def test_weights_are_not_loaded(
    check: Callable[..., Report], llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tensor data was loaded")

    monkeypatch.setattr("mergekit.io.lazy_tensor_loader.LazyTensorLoader.get_tensor", fail)
    check(llamas).is_clean()
