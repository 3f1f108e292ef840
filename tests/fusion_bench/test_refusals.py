"""What FusionBench's CART methods refuse, rather than return a wrong model, and when they do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool

from cart_plugin import CartError
from cart_plugin.errors import CartWarning
from cart_plugin.fusion_bench.adamerging import (
    CartCLIPAdaMergingAlgorithm,
    CartGPT2AdaMergingAlgorithm,
)
from cart_plugin.fusion_bench.adarank import CartGPT2AdaRankAlgorithm, CartImageAdaRankAlgorithm
from cart_plugin.fusion_bench.algorithm import CartAlgorithm, CartIndexingAlgorithm
from cart_plugin.fusion_bench.analysis import CartAnalysisAlgorithm
from cart_plugin.fusion_bench.image_adamerging import (
    CartImageAdaMergingAlgorithm,
    ImageClassificationAdaMergingAlgorithm,
)
from cart_plugin.fusion_bench.images import body
from tests.fusion_bench import tiny
from tests.fusion_bench.test_cart import close, lazy, models, network

CART: dict[str, Any] = {"rank": 2, "scaling_factor": 1.7}
LORA_B = "base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight"
OF_IMAGES = [
    CartImageAdaMergingAlgorithm,
    CartImageAdaRankAlgorithm,
    ImageClassificationAdaMergingAlgorithm,
]


@pytest.fixture(autouse=True)
def cache_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FusionBench's cache of zero-shot heads is that of the folder it was imported in."""
    monkeypatch.setattr("fusion_bench.utils.cache_utils.DEFAULT_CACHE_DIR", tmp_path / "cache")


def language_model(seed: int, *, tied: bool) -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=32, n_positions=8, tie_word_embeddings=tied
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    return tiny.perturbed(model, seed)


@pytest.mark.parametrize("method", [CartAlgorithm, CartIndexingAlgorithm, CartAnalysisAlgorithm])
def test_adapters_beside_the_weights_are_refused(method: Any, tmp_path: Path) -> None:
    import peft

    held = {}
    for seed in range(3):
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        held[f"task{seed}"] = peft.get_peft_model(language_model(seed, tied=True), config)
    run = method(output_path=str(tmp_path)) if method is CartAnalysisAlgorithm else method()
    for index, model in enumerate(held.values()):  # B is zero before any training
        torch.nn.init.constant_(model.get_parameter(LORA_B), index)
    with pytest.raises(CartError, match=r"adapters beside their weights .*lora_.*merge_and_unload"):
        run.run(BaseModelPool(held))
    whole = {name: model.merge_and_unload() for name, model in held.items()}
    run.run(BaseModelPool(whole))


@pytest.mark.parametrize(
    "settings",
    [{"decompose": "clip"}, {"decompose": ["*.bias"]}, {"exclude_keys": "*"}, {"decompose": []}],
    ids=str,
)
@pytest.mark.parametrize("scale", [2.0, "auto"])
def test_a_merge_that_decomposes_nothing_is_refused(settings: dict[str, Any], scale: Any) -> None:
    with pytest.raises(CartError, match="leave none of the 8 parameters to be decomposed: CART"):
        CartAlgorithm(scaling_factor=scale, **settings).run(BaseModelPool(models()))
    with pytest.raises(CartError, match="there are no ranks to adapt"):
        CartGPT2AdaRankAlgorithm(max_steps=0, **settings).run(BaseModelPool(models()))
    with pytest.warns(CartWarning, match="whole task vectors are adapted"):
        CartGPT2AdaMergingAlgorithm(max_steps=0, **settings).run(BaseModelPool(models()))


def test_adapters_that_all_models_have_alike_are_weights() -> None:
    """Some models are published with the factors of their makers' adapters."""
    held = {f"task{seed}": nn.Module() for seed in range(3)}
    for seed, model in enumerate(held.values()):
        model.body = network(seed)
        model.register_parameter("lora_A", nn.Parameter(torch.ones(2, 3)))
    merged: Any = CartAlgorithm().run(BaseModelPool(held))
    assert torch.equal(merged.lora_A, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
def test_patterns_may_mean_any_name_of_a_tied_tensor(name: str) -> None:
    held = {f"task{seed}": language_model(seed, tied=True) for seed in range(3)}
    mean = sum(model.lm_head.weight.detach() for model in held.values()) / 3

    def moved(**settings: Any) -> float:
        merged: Any = CartAlgorithm(scaling_factor=3.0, rank=2, **settings).run(BaseModelPool(held))
        return float((merged.lm_head.weight - mean).norm())

    assert moved(decompose=[name]) > 0.1
    assert moved(decompose="*") > 0.1
    assert moved(decompose="*", exclude_keys=[name]) < 1e-5


@pytest.mark.parametrize(
    "run",
    [
        CartAlgorithm(scaling_factor=3e5, rank=2),
        CartGPT2AdaMergingAlgorithm(scaling_factor=3e5, rank=2, max_steps=0),
        CartGPT2AdaRankAlgorithm(scaling_factor=3e5, rank=2, max_steps=0),
        CartIndexingAlgorithm(scaling_factor=3e5, rank=2),
    ],
    ids=lambda run: type(run).__name__,
)
def test_weights_that_a_dtype_cannot_hold_are_refused(run: Any) -> None:
    held = {name: model.half() for name, model in models(3).items()}
    with pytest.raises(CartError, match=r"leave the range of torch\.float16"):
        run.run(BaseModelPool(held))


@pytest.mark.parametrize("first_is_tied", [True, False])
def test_tied_models_beside_untied_ones(first_is_tied: bool) -> None:
    held = {
        f"task{seed}": language_model(seed, tied=first_is_tied == (seed == 0)) for seed in range(3)
    }
    head = sum(model.lm_head.weight.detach() for model in held.values()) / 3
    for run in (CartAlgorithm(**CART), CartGPT2AdaMergingAlgorithm(max_steps=0, **CART)):
        if first_is_tied:
            with pytest.raises(CartError, match=r"one tensor in task0, two in task1: name task1"):
                run.run(BaseModelPool(held))
        else:
            merged: Any = run.run(BaseModelPool(held))
            assert torch.allclose(merged.lm_head.weight, head, atol=1e-6)


def test_tied_tensors_are_stored_once() -> None:
    held = {f"task{seed}": language_model(seed, tied=True) for seed in range(3)}
    found = CartIndexingAlgorithm(rank=2).run(BaseModelPool(held))
    numbers = sum(parameter.numel() for parameter in held["task0"].parameters())
    assert found["storage"]["parameters_of_all_models"] == 3 * numbers
    restored: Any = found["task1"]
    assert restored.lm_head.weight.data_ptr() == restored.transformer.wte.weight.data_ptr()
    assert close(restored.transformer.wte, {"weight": held["task1"].lm_head.weight})


def test_a_deeper_pretrained_model_is_told() -> None:
    held = models()
    held["_pretrained_"] = nn.Sequential(*network(9), nn.Linear(5, 5))
    with pytest.warns(CartWarning, match=r"has 2 tensors of layers that the models have not: 4\."):
        CartAlgorithm(scaling_factor="auto").run(BaseModelPool(held))


def test_a_lazy_pretrained_model_may_hold_more(tmp_path: Path) -> None:
    folders = {}
    for seed, name in enumerate(["task0", "task1", "task2", "_pretrained_"]):
        folders[name] = str(tmp_path / name)
        model = language_model(seed, tied=False)
        if name == "_pretrained_":
            model.v_head = nn.Linear(16, 1)
        model.save_pretrained(folders[name])
    merged = CartAlgorithm(scaling_factor="auto").run(lazy(folders))
    whole = CartAlgorithm(scaling_factor="auto").run(
        BaseModelPool(
            {
                name: transformers.GPT2LMHeadModel.from_pretrained(folder)
                for name, folder in folders.items()
            }
        )
    )
    assert close(merged, whole.state_dict())


@pytest.mark.parametrize("algorithm", OF_IMAGES)
def test_models_with_a_head_a_task_are_not_saved(algorithm: Any, tmp_path: Path) -> None:
    run = algorithm(max_steps=0)
    run._program = SimpleNamespace(merged_model_save_path="merged")
    with pytest.raises(CartError, match=r"is merged, but the merged model has a head for each"):
        run.run(tiny.image_pool(tmp_path))


class Scaled(nn.Module):
    """A layer with a scale of no dimension."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.scale = network(seed), nn.Parameter(torch.tensor(1.0 + seed))


@pytest.mark.parametrize("algorithm", [CartGPT2AdaMergingAlgorithm, CartGPT2AdaRankAlgorithm])
def test_scalar_parameters_are_merged(algorithm: Any) -> None:
    held = {f"task{seed}": Scaled(seed) for seed in range(3)}
    expected = CartAlgorithm(**CART).run(BaseModelPool(held)).state_dict()
    merged = algorithm(max_steps=0, **CART).run(BaseModelPool(held))
    assert float(merged.scale) == pytest.approx(2.0)
    assert close(merged, expected)
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize(
    ("algorithm", "pool"),
    [
        (CartCLIPAdaMergingAlgorithm, tiny.clip_pool),
        (CartImageAdaMergingAlgorithm, tiny.image_pool),
    ],
)
def test_images_need_no_labels(
    algorithm: Any, pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pool(tmp_path)
    expected = algorithm(max_steps=2, batch_size=4, **CART).run(found).state_dict()
    whole = tiny.images

    def unlabelled(seed: int, count: int = 12) -> list[dict[str, Any]]:
        return [{"image": row["image"]} for row in whole(seed, count)]

    monkeypatch.setattr(tiny, "images", unlabelled)
    assert close(algorithm(max_steps=2, batch_size=4, **CART).run(found), expected)
    monkeypatch.setattr(tiny, "images", lambda seed: [row["image"] for row in whole(seed)])
    assert close(algorithm(max_steps=2, batch_size=4, **CART).run(found), expected)
    monkeypatch.setattr(tiny, "images", lambda seed: [])
    found.load_model = None  # nothing is merged before that is seen
    with pytest.raises(CartError, match="no test inputs of mnist, svhn, cifar10"):
        algorithm(max_steps=2, **CART).run(found)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_of_other_numbers_are_refused(precision: Any, tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    run = CartGPT2AdaMergingAlgorithm(max_steps=1, **CART)
    run.fabric = Fabric(accelerator="cpu", precision=precision)
    pool = tiny.gpt2_pool(tmp_path)
    with pytest.raises(CartError, match=f"precision={precision} would"):
        run.run(pool)


def test_images_in_other_numbers_than_the_models_are_told(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    def in_bf16(kind: str) -> Any:
        pool = tiny.image_pool(tmp_path / kind, kind)
        load = pool.load_model
        pool.load_model = lambda name, *args, **kwargs: load(name, *args, **kwargs).bfloat16()
        return pool

    # DINOv2 casts its inputs itself.
    CartImageAdaMergingAlgorithm(max_steps=1, **CART).run(in_bf16("dinov2"))
    with pytest.raises(CartError, match=r"models in torch\.bfloat16 do not run on mnist's inputs"):
        CartImageAdaMergingAlgorithm(max_steps=1, **CART).run(in_bf16("resnet"))
    run = CartImageAdaMergingAlgorithm(max_steps=1, **CART)
    run.fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    merged = run.run(in_bf16("resnet"))
    assert {one.dtype for one in body(merged).parameters()} == {torch.bfloat16}


def test_half_precision_has_entropies(tmp_path: Path) -> None:
    """Sure predictions: in fp16 the least probabilities are 0, and so is what is added to them."""
    pool = tiny.gpt2_pool(tmp_path)
    load = pool.load_model
    pool.load_model = lambda name, *args, **kwargs: load(name, *args, **kwargs).half()
    classifier = pool.load_classifier

    def sure(name: str) -> Any:
        found = classifier(name).half()
        found.score.weight.data *= 100
        return found

    pool.load_classifier = sure
    CartGPT2AdaMergingAlgorithm(max_steps=1, batch_size=12, **CART).run(pool)


def test_pools_of_another_kind_are_told_before_models_load(tmp_path: Path) -> None:
    pool = tiny.image_pool(tmp_path)
    pool.load_model = None  # nothing is loaded
    with pytest.raises(CartError, match="a pool such as CLIPVisionModelPool, got a Dinov2"):
        CartCLIPAdaMergingAlgorithm(**CART).run(pool)
    with pytest.raises(CartError, match="a pool such as GPT2ForSequenceClassificationPool"):
        CartGPT2AdaMergingAlgorithm(**CART).run(pool)
    with pytest.raises(CartError, match="the image processor does not load"):
        CartImageAdaMergingAlgorithm(processor=str(tmp_path / "none"), **CART).run(pool)


def test_tasks_without_class_names_are_told_before_models_load(tmp_path: Path) -> None:
    pool = tiny.clip_pool(tmp_path)
    for part in (pool._models, pool._test_datasets):
        part["colours"] = part.pop("svhn")
    pool.load_model = None
    with pytest.raises(CartError, match="no class names of a task colours"):
        CartCLIPAdaMergingAlgorithm(**CART).run(pool)


@pytest.mark.parametrize("name", ["merging_weights_save_path", "ranks_save_path"])
def test_places_that_hold_no_file_are_told_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given, message in [
        (str(tmp_path), f"{name}: .* is a folder"),
        (str(tmp_path / "file" / "masks"), f"{name}: .* cannot be written"),
        (5, f"{name} must be the path of a file, got 5"),
    ]:
        run = CartGPT2AdaRankAlgorithm(**{name: given}, **CART)
        with pytest.raises(CartError, match=message):
            run.run(BaseModelPool({}))


def test_names_without_a_folder_go_to_the_log_folder_beside_each_other(tmp_path: Path) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    pool = tiny.gpt2_pool(tmp_path / "pool")
    for rank in (1, 2, 3):  # the jobs of a multi-run
        run = CartGPT2AdaRankAlgorithm(
            rank=rank,
            max_steps=0,
            merging_weights_save_path="masks.safetensors",
            ranks_save_path="ranks.json",
        )
        logger = CSVLogger(tmp_path, name="log", version="")
        run.fabric = Fabric(accelerator="cpu", loggers=logger)
        run.run(pool)
        assert run.place("sub/masks.safetensors") == Path("sub/masks.safetensors")
    names = {path.name for path in (tmp_path / "log").iterdir() if path.suffix != ".csv"}
    assert names == {
        *("masks.safetensors", "masks-2.safetensors", "masks-3.safetensors"),
        *("ranks.json", "ranks-2.json", "ranks-3.json"),
    }
    second = json.loads((tmp_path / "log" / "ranks-2.json").read_text())
    assert {count for layer in second.values() for count in layer["chosen"].values()} == {2}


def test_a_name_without_a_folder_needs_none_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    pool = tiny.gpt2_pool(tmp_path / "pool")
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    run = CartGPT2AdaMergingAlgorithm(max_steps=0, merging_weights_save_path="weights", **CART)
    run.fabric = Fabric(accelerator="cpu", loggers=CSVLogger(tmp_path, name="log", version=""))
    run.run(pool)
    assert (tmp_path / "log" / "weights").is_file()


def test_the_analysis_of_a_lazy_pool_returns_a_module(tmp_path: Path) -> None:
    folders = {}
    for seed in range(3):
        folders[f"task{seed}"] = str(tmp_path / f"task{seed}")
        language_model(seed, tied=True).save_pretrained(folders[f"task{seed}"])
    found = CartAnalysisAlgorithm(output_path=str(tmp_path / "report")).run(lazy(folders))
    assert isinstance(found, transformers.GPT2LMHeadModel)
    assert (tmp_path / "report" / "report.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_factor": "much"}, "scaling_factor must be a finite number or auto, got 'much'"),
        ({"weights": ["a", "b", "c", "d"]}, "weights must be 4 numbers, in the order task0"),
        ({"weights": [1, 1, None, 1]}, "weights must be 4 numbers"),
        ({"weights": 3}, "weights must be 4 numbers"),
        ({"decompose": None}, "decompose is a preset"),
        ({"exclude_keys": "3.weight"}, None),
        ({"weights": np.array([1, 2, 3, 4])}, None),
        ({"weights": torch.tensor([1.0, 2.0, 3.0, 4.0])}, None),
    ],
    ids=str,
)
def test_parameters_of_the_wrong_kind(settings: dict[str, Any], message: str | None) -> None:
    pool = BaseModelPool(models())
    if message is None:
        CartAlgorithm(**settings).run(pool)
        return
    with pytest.raises(CartError, match=message):
        CartAlgorithm(**settings).run(pool)
