"""CART's methods in FusionBench against the core and against mergekit's CART."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool
from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool
from omegaconf import DictConfig

from cart_plugin import CartError, CartSettings, merge_state_dicts
from cart_plugin.errors import CartWarning
from cart_plugin.fusion_bench.algorithm import (
    CartAlgorithm,
    CartIndexingAlgorithm,
    CartUncenteredAlgorithm,
)
from cart_plugin.fusion_bench.base import CartBase
from cart_plugin.fusion_bench.selection import PRESETS, selection


def network(seed: int, width: int = 24) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(16, width), nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 5)
        )


def models(count: int = 4) -> dict[str, nn.Module]:
    return {"_pretrained_": network(99)} | {f"task{i}": network(i) for i in range(count)}


def states(held: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: model.state_dict() for name, model in held.items() if not name.startswith("_")}


def close(one: nn.Module, other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(t, other[n], atol=1e-6) for n, t in one.state_dict().items())


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"rank_ratio": 0.25, "scaling_factor": 2.0},
        {"rank": 3, "svd": "exact"},
        {"energy": 0.6, "seed": 7},
        {"scaling_factor": "auto"},
    ],
)
def test_cart_is_what_the_core_gives(parameters: dict[str, float]) -> None:
    held = models()
    merged = CartAlgorithm(**parameters).run(BaseModelPool(held))
    core = dict(parameters)
    core["lambda_"] = core.pop("scaling_factor", 1.0)
    base = held["_pretrained_"].state_dict() if core["lambda_"] == "auto" else None
    assert close(merged, merge_state_dicts(states(held), CartSettings(**core), base=base))


def test_auto_goes_by_the_pretrained_model_where_the_pool_has_one() -> None:
    held = models(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = CartAlgorithm(scaling_factor="auto").run(BaseModelPool(held))
    del held["_pretrained_"]
    with pytest.warns(CartWarning, match="give their base model"):
        averaged = CartAlgorithm(scaling_factor="auto").run(BaseModelPool(held))
    average = merge_state_dicts(states(held), CartSettings(rank=0))["2.weight"]
    assert torch.allclose(averaged.state_dict()["2.weight"], average, atol=1e-4)
    assert not torch.allclose(merged.state_dict()["2.weight"], average, atol=1e-2)


def test_of_the_pretrained_model_only_what_is_decomposed_matters() -> None:
    held = models(2)
    auto = {"scaling_factor": "auto", "decompose": ["2.*"]}
    merged = CartAlgorithm(**auto).run(BaseModelPool(held))
    held["_pretrained_"] = nn.Sequential(*held["_pretrained_"][:3], nn.Linear(24, 3))
    other_head = CartAlgorithm(**auto).run(BaseModelPool(held))
    assert close(merged, other_head.state_dict())
    with pytest.raises(CartError, match="in task0 but"):
        CartAlgorithm(scaling_factor="auto").run(BaseModelPool(held))
    held["_pretrained_"] = held["_pretrained_"][:1]
    with pytest.raises(CartError, match="pretrained model lacks 2 of the 3 tensors"):
        CartAlgorithm(scaling_factor="auto").run(BaseModelPool(held))


def test_auto_is_for_methods_that_make_one_model() -> None:
    with pytest.raises(CartError, match="auto makes one merged model"):
        CartIndexingAlgorithm(scaling_factor="auto")


def test_models_of_the_pool_are_left_alone() -> None:
    held = models()
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in held.items()}
    CartAlgorithm(scaling_factor=3.0).run(BaseModelPool(held))
    CartIndexingAlgorithm(rank=1).run(BaseModelPool(held))
    assert all(close(held[name], before[name]) for name in held)


def test_cart_needs_no_pretrained_model() -> None:
    held = models()
    expected = CartAlgorithm().run(BaseModelPool(held))
    del held["_pretrained_"]
    assert close(CartAlgorithm().run(BaseModelPool(held)), expected.state_dict())


def test_uncentred_is_low_rank_task_arithmetic() -> None:
    held = models()
    merged = CartUncenteredAlgorithm(rank=2, scaling_factor=0.4).run(BaseModelPool(held))
    base = held["_pretrained_"].state_dict()["2.weight"]
    expected = base.clone()
    for state in states(held).values():
        u, s, vh = torch.linalg.svd(state["2.weight"] - base)
        expected += 0.4 * (u[:, :2] * s[:2]) @ vh[:2]
    assert torch.allclose(merged.state_dict()["2.weight"], expected, atol=1e-5)


def test_uncentred_says_that_it_needs_the_pretrained_model() -> None:
    held = models()
    del held["_pretrained_"]
    with pytest.raises(CartError, match="_pretrained_"):
        CartUncenteredAlgorithm().run(BaseModelPool(held))


@pytest.mark.parametrize("listed", [False, True])
def test_weights_go_to_their_models(listed: bool) -> None:
    held = models(3)
    weights = {"task0": 1.0, "task1": 2.0, "task2": 0.5}
    given = list(weights.values()) if listed else dict(reversed(weights.items()))
    merged = CartAlgorithm(weights=given).run(BaseModelPool(held))
    assert close(merged, merge_state_dicts(states(held), weights=list(weights.values())))


def test_weights_of_other_models_are_refused() -> None:
    with pytest.raises(CartError, match="task9"):
        CartAlgorithm(weights={"task0": 1, "task1": 1, "task9": 1}).run(BaseModelPool(models(3)))


def test_patterns_decide_what_is_decomposed() -> None:
    held = models()
    merged = CartAlgorithm(decompose=["2.*"], rank=1, scaling_factor=5.0).run(BaseModelPool(held))
    mean = merge_state_dicts(states(held), CartSettings(rank=0))
    same = {n for n, t in merged.state_dict().items() if torch.allclose(t, mean[n], atol=1e-6)}
    assert same == set(mean) - {"2.weight"}


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(CartError, match=r"'\*\.attn\.\*'.*0\.weight"):
        CartAlgorithm(decompose=["2.*", "*.attn.*"]).run(BaseModelPool(models()))


def test_excluded_parameters_are_averaged() -> None:
    held = models()
    excluding = CartAlgorithm(exclude_keys=["0.weight", "3.*"], rank=1, scaling_factor=5.0)
    merged = excluding.run(BaseModelPool(held))
    mean = merge_state_dicts(states(held), CartSettings(rank=0))
    same = {n for n, t in merged.state_dict().items() if torch.allclose(t, mean[n], atol=1e-6)}
    assert same == set(mean) - {"2.weight"}
    with pytest.raises(CartError, match=r"exclude_keys: '\*\.head' matches none"):
        CartAlgorithm(exclude_keys=["*.head"]).run(BaseModelPool(held))


@pytest.mark.parametrize("kind", [CartAlgorithm, CartUncenteredAlgorithm])
def test_single_task_models_are_the_centre_and_one_truncated_vector(kind: type) -> None:
    held = models()
    settings = {"rank": 2, "scaling_factor": 3.0}
    found = kind(return_single_task_models=True, **settings).run(BaseModelPool(held))
    assert list(found) == ["task0", "task1", "task2", "task3", "merged"]
    assert close(found["merged"], kind(**settings).run(BaseModelPool(held)).state_dict())
    centred = kind is CartAlgorithm
    mean = merge_state_dicts(states(held), CartSettings(rank=0))
    centre = mean if centred else held["_pretrained_"].state_dict()
    for name, one in found.items():
        difference = one.state_dict()["2.weight"] - centre["2.weight"]
        rank = torch.linalg.matrix_rank(difference, atol=1e-4)
        assert rank == (2 if name != "merged" else 8)


@pytest.mark.parametrize(
    "method", [CartIndexingAlgorithm(), CartAlgorithm(return_single_task_models=True)]
)
def test_several_models_are_not_made_where_they_would_fail_to_be_saved(method: CartBase) -> None:
    method._program = SimpleNamespace(merged_model_save_path="merged")
    with pytest.raises(CartError, match="merged_model_save_path is merged"):
        method.run(BaseModelPool(models()))


def test_too_few_models_are_refused() -> None:
    with pytest.raises(CartError, match="at least two"):
        CartAlgorithm().run(BaseModelPool(models(1)))


def test_models_of_different_shapes_are_named() -> None:
    held = models()
    held["task2"] = network(2, width=20)
    with pytest.raises(CartError, match=r"task2|task0"):
        CartAlgorithm().run(BaseModelPool(held))


def test_models_with_other_tensors_are_named() -> None:
    held = models()
    held["task2"] = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(CartError, match="task2 lacks"):
        CartIndexingAlgorithm().run(BaseModelPool(held))


def test_a_broken_checkpoint_is_named() -> None:
    held = models()
    with torch.no_grad():
        held["task1"][2].weight[0, 0] = torch.nan
    with pytest.raises(CartError, match=r"'2\.weight' of task1 .* NaN"):
        CartAlgorithm().run(BaseModelPool(held))


@pytest.mark.parametrize("parameters", [{"rank_ratio": 2.0}, {"rank": 4, "rank_ratio": 0.1}])
def test_wrong_parameters_are_told_before_models_load(parameters: dict[str, float]) -> None:
    with pytest.raises(CartError):
        CartAlgorithm(**parameters)


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = {}
    for seed in range(3):
        torch.manual_seed(seed)
        config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=8)
        folders[f"task{seed}"] = str(tmp_path / f"task{seed}")
        GPT2LMHeadModel(config).save_pretrained(folders[f"task{seed}"])
    return folders


def lazy(checkpoints: dict[str, str]) -> LazyStateDictPool:
    return LazyStateDictPool(
        {
            name: {
                "_target_": "fusion_bench.LazyStateDict",
                "checkpoint": folder,
                "meta_module_class": "transformers.AutoModelForCausalLM",
            }
            for name, folder in checkpoints.items()
        }
    )


def test_lazy_state_dicts_are_merged(checkpoints: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    pool = lazy(checkpoints)
    merged = CartAlgorithm(rank=2).run(pool)
    whole = {
        name: AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name, folder in checkpoints.items()
    }
    assert close(merged, merge_state_dicts(whole, CartSettings(rank=2)))


def test_lazy_state_dicts_without_a_class_say_what_they_lack(checkpoints: dict[str, str]) -> None:
    with pytest.raises(CartError, match="meta_module_class"):
        CartAlgorithm(rank=2).run(LazyStateDictPool(checkpoints))


def test_mergekit_and_fusionbench_give_the_same_weights(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    import cart_plugin.mergekit

    cart_plugin.mergekit.register()
    recipe = {
        "merge_method": "cart",
        "models": [{"model": folder} for folder in checkpoints.values()],
        "parameters": {"rank_ratio": 0.25, "lambda": 1.5},
        "dtype": "float32",
    }
    out = tmp_path / "out"
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe))),
        str(out),
        MergeOptions(write_model_card=False),
    )
    pool = lazy(checkpoints)
    merged = CartAlgorithm(rank_ratio=0.25, scaling_factor=1.5).run(pool).state_dict()
    written = load_file(out / "model.safetensors")
    compared = [name for name in merged if name in written]
    assert len(compared) > 20
    for name in compared:
        apart = (merged[name] - written[name]).norm() / written[name].norm().clamp_min(1e-12)
        assert apart <= 1e-6, name


@pytest.mark.parametrize("preset", ["clip", "roberta", "gpt2"])
def test_presets_leave_vectors_alone(preset: str) -> None:
    assert not PRESETS[preset]("h.0.mlp.c_fc.bias", torch.Size([8]))


def test_one_pattern_may_be_a_string() -> None:
    decide = selection("*.mlp.*", ["h.0.mlp.c_fc.weight", "wte.weight"])
    assert decide("h.0.mlp.c_fc.weight", torch.Size([4, 4]))
    assert not decide("wte.weight", torch.Size([4, 4]))


@pytest.mark.parametrize("shape", [(8, 4, 1), (8, 4, 3), (1, 4, 3), (8,), (), (0, 4, 1)])
def test_patterns_decompose_convolutions_as_auto_does(shape: tuple[int, ...]) -> None:
    names = ["encoder.conv1.weight"]
    expected = selection("auto", names)(names[0], torch.Size(shape))
    assert selection("*conv*", names)(names[0], torch.Size(shape)) is expected
    assert expected is (shape in {(8, 4, 1), (8, 4, 3)})


@pytest.mark.parametrize("lazily", [False, True])
def test_causal_language_models_are_merged(checkpoints: dict[str, str], lazily: bool) -> None:
    from fusion_bench.modelpool.causal_lm.causal_lm import CausalLMPool
    from transformers import AutoModelForCausalLM

    pool = CausalLMPool(dict(checkpoints), tokenizer=None, enable_lazy_loading=lazily)
    merged = CartAlgorithm(rank=2).run(pool)
    whole = {
        name: AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name, folder in checkpoints.items()
    }
    assert close(merged, merge_state_dicts(whole, CartSettings(rank=2)))


@pytest.fixture
def classifiers(tmp_path: Path) -> dict[str, str]:
    from transformers import BertConfig, BertForSequenceClassification

    folders = {}
    for seed in range(3):
        torch.manual_seed(seed)
        config = BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=32,
            num_labels=2 + seed // 2,
        )
        folders[f"task{seed}"] = str(tmp_path / f"classifier{seed}")
        BertForSequenceClassification(config).save_pretrained(folders[f"task{seed}"])
    return folders


def sequence_classifiers(folders: dict[str, str]) -> BaseModelPool:
    from fusion_bench.modelpool.seq_classification_lm import SequenceClassificationModelPool

    target = "transformers.AutoModelForSequenceClassification.from_pretrained"
    return SequenceClassificationModelPool(
        {
            name: {"_target_": target, "pretrained_model_name_or_path": folder}
            for name, folder in folders.items()
        },
        tokenizer=None,
        model_kwargs=DictConfig({}),
    )


def test_sequence_classifiers_are_merged(classifiers: dict[str, str]) -> None:
    alike = dict.fromkeys(("a", "b", "c"), classifiers["task0"])
    pool = sequence_classifiers(alike)
    assert close(CartAlgorithm().run(pool), pool.load_model("a").state_dict())


def test_heads_of_different_sizes_are_named(classifiers: dict[str, str]) -> None:
    with pytest.raises(CartError, match=r"classifier\.weight.*task0.*task2"):
        CartAlgorithm().run(sequence_classifiers(classifiers))


def test_what_kept_nearly_all_is_told_once_at_the_end() -> None:
    with pytest.warns(CartWarning, match="3 of 3 decomposed tensors kept at least 99%") as told:
        CartAlgorithm(rank=24).run(models())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        CartAlgorithm(rank=2).run(models())
        CartUncenteredAlgorithm(rank=24).run(models())
