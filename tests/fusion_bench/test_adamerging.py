"""CART + AdaMerging, and plain AdaMerging for images, on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("fusion_bench")

import cart_plugin.fusion_bench
from cart_plugin import CartError
from cart_plugin.fusion_bench.adamerging import (
    CartAdaMerging,
    CartCLIPAdaMergingAlgorithm,
    CartFlanT5AdaMergingAlgorithm,
    CartGPT2AdaMergingAlgorithm,
)
from cart_plugin.fusion_bench.adarank import CartGPT2AdaRankAlgorithm
from cart_plugin.fusion_bench.algorithm import CartAlgorithm
from cart_plugin.fusion_bench.fleet import aliases
from cart_plugin.fusion_bench.image_adamerging import (
    CartImageAdaMergingAlgorithm,
    ImageClassificationAdaMergingAlgorithm,
)
from cart_plugin.fusion_bench.images import body
from tests.fusion_bench import tiny

CONFIGS = Path(cart_plugin.fusion_bench.__file__).parent / "conf" / "method" / "cart"
Pool = Callable[..., Any]
CART = {"rank": 2, "scaling_factor": 1.7}
TEXT_AND_CLIP = [
    pytest.param(CartCLIPAdaMergingAlgorithm, tiny.clip_pool, id="clip"),
    pytest.param(CartGPT2AdaMergingAlgorithm, tiny.gpt2_pool, id="gpt2"),
    pytest.param(CartFlanT5AdaMergingAlgorithm, tiny.t5_pool, id="flan-t5"),
]


@pytest.fixture(autouse=True)
def cache_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FusionBench's cache of zero-shot heads is that of the folder it was imported in."""
    monkeypatch.setattr("fusion_bench.utils.cache_utils.DEFAULT_CACHE_DIR", tmp_path / "cache")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(tensor, other[name], atol=atol) for name, tensor in one.items()
    )


def entropies(model: nn.Module) -> Iterator[float]:
    """The mean entropy of a merged image model on each task's images."""
    from fusion_bench.models.wrappers.switch import set_active_option

    with torch.no_grad():
        for seed, task in enumerate(tiny.TASKS):
            set_active_option(model, task)
            outputs = model(torch.stack([pixels(row["image"]) for row in tiny.images(seed)]))
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            yield torch.distributions.Categorical(logits=logits).entropy().mean().item()


def pixels(image: Any) -> torch.Tensor:
    import numpy as np

    return torch.tensor(np.asarray(image) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize(("algorithm", "pool"), TEXT_AND_CLIP)
def test_step_0_is_cart(
    algorithm: type[CartAdaMerging], pool: Pool, granularity: str, tmp_path: Path
) -> None:
    models = pool(tmp_path)
    expected = CartAlgorithm(**CART).run(models).state_dict()
    merged = algorithm(granularity=granularity, max_steps=0, **CART).run(models)
    assert same(merged.state_dict(), expected)


@pytest.mark.parametrize(("algorithm", "pool"), TEXT_AND_CLIP)
def test_step_0_is_cart_auto(algorithm: type[CartAdaMerging], pool: Pool, tmp_path: Path) -> None:
    models, settings = pool(tmp_path), {"scaling_factor": "auto", "weights": [1.0, 3.0, 0.5]}
    expected = CartAlgorithm(**settings).run(models).state_dict()
    assert same(algorithm(max_steps=0, **settings).run(models).state_dict(), expected)


@pytest.mark.parametrize("pretrained", [True, False])
def test_images_step_0_is_cart_auto(pretrained: bool, tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path, pretrained=pretrained)
    expected = body(CartAlgorithm(scaling_factor="auto").run(models)).state_dict()
    merged = CartImageAdaMergingAlgorithm(scaling_factor="auto", max_steps=0).run(models)
    assert same(body(merged).state_dict(), expected)


def test_step_0_is_cart_with_weights(tmp_path: Path) -> None:
    models, weights = tiny.gpt2_pool(tmp_path), {"mnist": 1.0, "svhn": 3.0, "cifar10": 0.5}
    expected = CartAlgorithm(weights=weights, **CART).run(models).state_dict()
    merged = CartGPT2AdaMergingAlgorithm(weights=weights, max_steps=0, **CART).run(models)
    assert same(merged.state_dict(), expected)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize(("algorithm", "pool"), TEXT_AND_CLIP)
def test_adapted_coefficients_are_saved_and_reloaded(
    algorithm: type[CartAdaMerging], pool: Pool, granularity: str, tmp_path: Path
) -> None:
    models, file = pool(tmp_path), tmp_path / "saved" / "coefficients.safetensors"
    settings = {"granularity": granularity, "batch_size": 4, **CART}
    run = algorithm(max_steps=2, merging_weights_save_path=str(file), **settings)
    merged = run.run(models).state_dict()
    coefficients = load_file(file)["coefficients"]
    assert coefficients.ndim == (2 if granularity == "layer" else 1)
    assert len(coefficients) == 3
    assert 0 < (coefficients - 1.7).abs().max() < 0.01  # two steps of Adam at 1e-3
    assert [p.name for p in file.parent.iterdir()] == ["coefficients.safetensors"]
    again = algorithm(merging_weights_load_path=str(file), **settings).run(models)
    assert same(again.state_dict(), merged, 0)
    assert not same(merged, CartAlgorithm(**CART).run(models).state_dict(), 1e-6)


def test_runs_of_one_seed_are_equal(tmp_path: Path) -> None:
    models = tiny.gpt2_pool(tmp_path)
    settings = {"max_steps": 1, "lr": 0.1, "batch_size": 4, **CART}
    one, other = (CartGPT2AdaMergingAlgorithm(**settings).run(models) for _ in range(2))
    assert same(one.state_dict(), other.state_dict(), 0)


def test_tied_parameters_run_with_the_merged_weights(tmp_path: Path) -> None:
    models = tiny.t5_pool(tmp_path)
    run = CartFlanT5AdaMergingAlgorithm(**CART)
    module = run.construct(models)
    tied = aliases(module.model)
    assert "encoder.embed_tokens.weight" in tied
    with torch.no_grad():
        module.merge_weight.uniform_(generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0]])}
        wrapped = module(**inputs).logits
        assert torch.allclose(wrapped, module.unload()(**inputs).logits, atol=1e-6)


def test_clip_needs_the_pretrained_model_for_its_heads(tmp_path: Path) -> None:
    models = tiny.clip_pool(tmp_path, pretrained=False)
    with pytest.raises(CartError, match="_pretrained_"):
        CartCLIPAdaMergingAlgorithm(**CART).run(models)
    CartCLIPAdaMergingAlgorithm(max_steps=0, **CART).run(models)


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_images_step_0_is_cart(granularity: str, tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path, pretrained=False)
    expected = body(CartAlgorithm(**CART).run(models)).state_dict()
    run = CartImageAdaMergingAlgorithm(granularity=granularity, max_steps=0, **CART)
    assert same(body(run.run(models)).state_dict(), expected)


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_convolutional_pools_keep_their_statistics(kind: str, tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path, kind)
    expected = body(CartAlgorithm(**CART).run(models)).state_dict()
    assert same(
        body(CartImageAdaMergingAlgorithm(max_steps=0, **CART).run(models)).state_dict(), expected
    )
    merged = CartImageAdaMergingAlgorithm(max_steps=2, batch_size=4, **CART).run(models)
    buffers = dict(body(merged).named_buffers())
    assert bool(buffers) == (kind == "resnet")
    assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers.items())
    weights = dict(body(merged).named_parameters())
    assert not all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_plain_step_0_is_task_arithmetic(granularity: str, tmp_path: Path) -> None:
    from fusion_bench.method import TaskArithmeticAlgorithm

    models = tiny.image_pool(tmp_path)
    expected = body(TaskArithmeticAlgorithm(scaling_factor=0.3).run(models)).state_dict()
    run = ImageClassificationAdaMergingAlgorithm(granularity=granularity, max_steps=0)
    assert same(body(run.run(models)).state_dict(), expected)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(CartImageAdaMergingAlgorithm, CART), (ImageClassificationAdaMergingAlgorithm, {})],
)
def test_adaptation_lowers_entropy_and_reloads(
    algorithm: Any, settings: dict[str, float], granularity: str, tmp_path: Path
) -> None:
    models, file = tiny.image_pool(tmp_path), tmp_path / "coefficients.safetensors"
    settings = {**settings, "granularity": granularity}
    before = sum(entropies(algorithm(max_steps=0, **settings).run(models)))
    adapting = {"max_steps": 8, "lr": 0.05, "batch_size": 12}
    run = algorithm(merging_weights_save_path=str(file), **adapting, **settings)
    merged = run.run(models)
    assert sum(entropies(merged)) < before - 0.01
    again = algorithm(merging_weights_load_path=str(file), **settings).run(models)
    assert same(again.state_dict(), merged.state_dict(), 0)


def test_each_task_keeps_its_head(tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path)
    run = CartImageAdaMergingAlgorithm(max_steps=1, lr=0.1, **CART)
    merged = run.run(models)
    for task in tiny.TASKS:
        merged.classifier.set_active_option(task)
        own = models.load_model(task).classifier
        assert torch.equal(merged.classifier.weight, own.weight)
        assert torch.equal(merged.classifier.bias, own.bias)


def test_heads_may_differ_in_their_classes(tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path)
    tiny.dinov2(1, classes=4).save_pretrained(tmp_path / "svhn")
    merged = CartImageAdaMergingAlgorithm(max_steps=1, **CART).run(models)
    merged.classifier.set_active_option("svhn")
    assert merged(torch.zeros(1, 3, 16, 16)).shape == (1, 4)


def test_heads_of_encoders_are_given(tmp_path: Path) -> None:
    folders = {task: tmp_path / f"head_{task}" for task in tiny.TASKS}
    for seed, folder in enumerate(folders.values()):
        tiny.dinov2(seed).save_pretrained(folder)
    models = tiny.image_pool(tmp_path / "encoders", classes=0)
    with pytest.raises(CartError, match="mnist has no classifier"):
        CartImageAdaMergingAlgorithm(max_steps=1, **CART).run(models)
    heads = {task: str(folder) for task, folder in folders.items()}
    merged = CartImageAdaMergingAlgorithm(max_steps=1, heads=heads, **CART).run(models)
    assert merged(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    with pytest.raises(CartError, match="dtd"):
        CartImageAdaMergingAlgorithm(heads={"dtd": "x"}, **CART).run(models)


def test_models_that_a_pool_holds_are_left_alone(tmp_path: Path) -> None:
    from fusion_bench import BaseModelPool

    loader = tiny.image_pool(tmp_path)
    held = {name: loader.load_model(name) for name in (*tiny.TASKS, tiny.PRETRAINED)}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in held.items()}
    pool = BaseModelPool(held, test_datasets=tiny.data_sets("images"))
    settings: dict[str, Any] = {"processor": pixels, "max_steps": 2, "lr": 0.1}
    merged = CartImageAdaMergingAlgorithm(**settings, **CART).run(pool)
    ImageClassificationAdaMergingAlgorithm(**settings).run(pool)
    assert all(same(m.state_dict(), before[n], 0) for n, m in held.items())
    # The pools' models have a `forward` of their own: a copy of it would run their weights.
    own = list(entropies(merged))
    for model in held.values():
        tiny.perturbed(model, 5, 1.0)
    assert list(entropies(merged)) == own


def test_the_merged_model_goes_to_the_task_pool(tmp_path: Path) -> None:
    from fusion_bench.taskpool.image_classification import ImageClassificationTaskPool

    models = tiny.image_pool(tmp_path)
    merged = CartImageAdaMergingAlgorithm(max_steps=1, **CART).run(models)
    taskpool = ImageClassificationTaskPool(
        tiny.data_sets("images"),
        processor=str(tmp_path / "mnist"),
        dataloader_kwargs={"batch_size": 6},
    )
    report = taskpool.evaluate(merged)
    assert set(tiny.TASKS) < set(report)


def test_test_data_is_asked_for(tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path)
    del models._test_datasets["svhn"]
    with pytest.raises(CartError, match=r"none for svhn.*test_datasets"):
        CartImageAdaMergingAlgorithm(**CART).run(models)


def test_plain_needs_the_pretrained_model(tmp_path: Path) -> None:
    models = tiny.image_pool(tmp_path, pretrained=False)
    with pytest.raises(CartError, match="_pretrained_"):
        ImageClassificationAdaMergingAlgorithm(max_steps=0).run(models)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (torch.zeros(3, 5), r"\(3, 5\).*\(3, 43\)"),
        (torch.zeros(3), r"granularity"),
        ({"merge_weight": torch.zeros(3)}, "holds dict"),
        (torch.full((3, 43), torch.nan), "NaN"),
        (b"nothing", "neither what an adaptation has saved nor a tensor"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(
    written: Any, message: str, tmp_path: Path
) -> None:
    models, file = tiny.image_pool(tmp_path), tmp_path / "coefficients.pt"
    run = CartImageAdaMergingAlgorithm(merging_weights_load_path=str(file), **CART)
    with pytest.raises(CartError, match="no file"):
        run.run(models)
    if isinstance(written, bytes):
        file.write_bytes(written)
    else:
        torch.save(written, file)
    with pytest.raises(CartError, match=message):
        run.run(models)


def test_coefficients_of_fusion_benchs_own_adamerging_are_taken(tmp_path: Path) -> None:
    models, file = tiny.image_pool(tmp_path), tmp_path / "merging_weights.pt"
    torch.save(torch.full((3, 43), 1.7), file)
    merged = CartImageAdaMergingAlgorithm(merging_weights_load_path=str(file), **CART).run(models)
    expected = body(CartAlgorithm(**CART).run(models)).state_dict()
    assert same(body(merged).state_dict(), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": [1.0, 2.0, 3.0]}, "of other models, or of another rank rule"),
        ({"rank": 3}, "of other models, or of another rank rule"),
        ({"scaling_factor": "auto"}, "of other models, or of another rank rule"),
        ({"granularity": "task"}, "granularity"),
    ],
    ids=str,
)
def test_coefficients_of_another_run_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    models, file = tiny.gpt2_pool(tmp_path / "pool"), tmp_path / "coefficients.safetensors"
    kept = {"max_steps": 0, "merging_weights_save_path": str(file)}
    CartGPT2AdaMergingAlgorithm(**kept, **CART).run(models)
    other = {**CART, **changed, "merging_weights_load_path": str(file)}
    with pytest.raises(CartError, match=message):
        CartGPT2AdaMergingAlgorithm(**other).run(models)


def test_coefficients_of_models_in_another_order_are_refused(tmp_path: Path) -> None:
    from fusion_bench import BaseModelPool

    pool, file = tiny.gpt2_pool(tmp_path / "pool"), tmp_path / "coefficients.safetensors"
    kept = {"max_steps": 0, "merging_weights_save_path": str(file)}
    CartGPT2AdaMergingAlgorithm(**kept, **CART).run(pool)
    turned = BaseModelPool({task: pool.load_model(task) for task in reversed(tiny.TASKS)})
    with pytest.raises(CartError, match=r"adapted to mnist, svhn, cifar10, the pool has cifar10"):
        CartGPT2AdaMergingAlgorithm(merging_weights_load_path=str(file), **CART).run(turned)


def test_masks_are_no_coefficients_alone(tmp_path: Path) -> None:
    pool, file = tiny.gpt2_pool(tmp_path / "pool"), tmp_path / "masks.safetensors"
    # A full choice, so that all else is the same.
    kept = {"max_steps": 0, "merging_weights_save_path": str(file), "candidates": 1.0}
    whole = {"rank": 16, "decompose": "*"}
    CartGPT2AdaRankAlgorithm(**whole, **kept).run(pool)
    run = CartGPT2AdaMergingAlgorithm(**whole, merging_weights_load_path=str(file))
    with pytest.raises(CartError, match="holds masks: of cart/adarank"):
        run.run(pool)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*ada*.yaml")), ids=lambda p: p.stem)
def test_configs_give_the_defaults(config: Path) -> None:
    from fusion_bench.utils import instantiate

    settings = OmegaConf.load(config)
    algorithm = instantiate(settings)
    plain = type(algorithm)()
    for name in set(settings) - {"_target_", "_recursive_"}:
        changed = {"merging_weights_save_path", "num_workers", "batch_size", "ranks_save_path"}
        assert name in changed or getattr(algorithm, name) == getattr(plain, name), name


def test_a_body_is_the_model_without_its_head() -> None:
    model = nn.Module()
    model.stem, model.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
    model.register_parameter("token", nn.Parameter(torch.zeros(1)))
    expected = {name for name in model.state_dict() if not name.startswith("fc.")}
    assert set(body(model).state_dict()) == expected
    with pytest.raises(CartError, match="Linear without a module classifier or fc"):
        body(nn.Linear(2, 2))


@pytest.mark.parametrize("wrong", [{"granularity": "tensor"}, {"max_steps": -1}])
def test_wrong_parameters_are_told_first(wrong: dict[str, Any]) -> None:
    with pytest.raises(CartError, match=next(iter(wrong))):
        CartImageAdaMergingAlgorithm(**wrong)
