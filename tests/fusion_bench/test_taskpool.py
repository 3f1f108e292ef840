"""Our task pools: CLIP on transformers 5, heads outside the merge, LM evaluation."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("fusion_bench")

from datasets import load_from_disk
from fusion_bench.models.wrappers.switch import SwitchModule
from transformers import AutoModelForCausalLM, BitImageProcessor

from cart_plugin import CartError
from cart_plugin.fusion_bench import taskpool
from tests.fusion_bench import pools


def image_pool(folder: Path, heads: dict[str, int], **changes: Any) -> Any:
    """Our pool with heads of so many classes, and random images of as many."""
    for task, classes in heads.items():
        pools.save_head(folder / "heads" / task, classes)
        pools.save_images(folder / "data" / task, classes)
    size = {"height": pools.SIZE, "width": pools.SIZE}
    arguments: dict[str, Any] = {
        "test_datasets": {task: load_from_disk(folder / "data" / task) for task in heads},
        "heads": {task: str(folder / "heads" / task) for task in heads},
        "processor": BitImageProcessor(size=size, do_center_crop=False),
        "dataloader_kwargs": {"batch_size": 4},
    }
    return taskpool.ImageClassificationTaskPool(**arguments | changes)


def encoder(seed: int = 0, **config: Any) -> nn.Module:
    return pools.random_model("Dinov2ForImageClassification", seed, **config)


def test_a_copy_of_a_pools_model_is_judged_by_its_own_weights(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"five-things": 5})
    first, second = encoder(0), encoder(1)
    expected = pool.evaluate(second)["five-things"]["loss"]
    original = first.forward  # as FusionBench's pools do it
    first.forward = lambda pixel_values, **more: original(pixel_values=pixel_values, **more).logits
    first.original_forward = original
    copy = deepcopy(first)
    copy.load_state_dict(second.state_dict())
    before = dict(vars(copy))

    assert pool.evaluate(copy)["five-things"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert {name: vars(copy)[name] for name in ("forward", "original_forward")} == {
        name: before[name] for name in ("forward", "original_forward")
    }


def test_models_that_are_told_their_task_are_told(tmp_path: Path) -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.tasks = encoder(), []

        def set_task(self, task: str) -> None:
            self.tasks.append(task)

        def forward(self, images: torch.Tensor) -> Any:
            return self.encoder(images)

    model = Told()
    image_pool(tmp_path, {"five-things": 5, "mnist": 10}).evaluate(model)
    assert model.tasks == ["five-things", "mnist"]


def test_heads_turn_an_encoder_into_a_classifier_of_each_task(tmp_path: Path) -> None:
    whole = {"batch_size": 6}
    pool = image_pool(tmp_path, {"five-things": 5, "mnist": 10}, dataloader_kwargs=whole)
    model = encoder()
    report = pool.evaluate(model, name="tiny")

    images, labels = next(iter(pool.test_dataloaders["five-things"]))
    with torch.no_grad():
        logits = pool._heads["five-things"](model(images).logits)
    right = (logits.argmax(dim=1) == labels).float().mean()
    assert report["five-things"]["accuracy"] == pytest.approx(float(right))
    loss = nn.functional.cross_entropy(logits, labels)
    assert report["five-things"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert report["mnist"]["loss"] > 0
    assert 0 <= report["average"]["accuracy"] <= 1
    assert report["model_info"]["trainable_params"] == sum(p.numel() for p in model.parameters())


def test_the_model_is_given_back_as_it_was_and_data_is_loaded_once(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"two-things": 2})
    model = encoder()
    first = pool.evaluate(model)
    loaders = pool.test_dataloaders
    second = pool.evaluate(model)

    assert isinstance(model.classifier, nn.Identity)
    assert first == second
    assert pool.test_dataloaders is loaders


def test_heads_replace_a_classifier_that_the_merge_has_made_meaningless(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"two-more-things": 2})
    model = encoder()
    expected = pool.evaluate(model)["two-more-things"]
    model.classifier = nn.Linear(64, 7)
    assert pool.evaluate(model)["two-more-things"] == expected


def test_a_switch_of_models_answers_each_task_with_its_own(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"left": 3, "right": 3})
    models = {"left": encoder(1), "right": encoder(2)}
    switched = pool.evaluate(SwitchModule(models))

    for task, model in models.items():
        assert switched[task] == pool.evaluate(model)[task]


def test_a_half_precision_encoder_is_evaluated_too(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"half-things": 2}, processor=half)
    assert "accuracy" in pool.evaluate(encoder().to(torch.bfloat16))["half-things"]


def half(image: Any) -> torch.Tensor:
    return torch.ones(3, pools.SIZE, pools.SIZE, dtype=torch.bfloat16)


def test_a_head_is_read_from_a_whole_sharded_classifier(tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    pools.save_head(folder, 4)
    save_file({"dinov2.layernorm.weight": torch.ones(3)}, folder / "model-00001-of-2.safetensors")
    head = taskpool._load_head("any", folder)
    assert (head.out_features, head.in_features) == (4, 64)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_missing_and_unfit_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(CartError, match=r"no head for task 'b-task'; it has a-task"):
        taskpool._load_heads({"a-task": "x"}, ["b-task"])
    with pytest.raises(CartError, match=r"task 'a-task': no .safetensors file in .*nowhere"):
        taskpool._load_heads({"a-task": str(tmp_path / "nowhere")}, ["a-task"])
    with pytest.raises(CartError, match="test_datasets is empty"):
        taskpool._load_heads({}, [])

    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CartError, match=r"task 'a-task': no classifier.weight in"):
        taskpool._load_head("a-task", tmp_path)
    save_file({"classifier.weight": torch.ones(2, 2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CartError, match=r"not linear: classifier.weight \(2, 2, 2\)"):
        taskpool._load_head("a-task", tmp_path)

    wide = pools.save_head(tmp_path / "wide", 2, features=48)
    narrow = pools.save_head(tmp_path / "narrow", 2)
    with pytest.raises(CartError, match="different widths: one: 48, two: 64"):
        taskpool._load_heads({"one": str(wide), "two": str(narrow)}, ["one", "two"])


def test_a_head_of_another_size_than_the_known_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CartError, match=r"task 'svhn' has 3 classes.* has 10"):
        image_pool(tmp_path, {"svhn": 3})


def test_heads_of_another_size_are_taken_for_the_next_job_of_a_process(tmp_path: Path) -> None:
    first = image_pool(tmp_path / "first", {"grown-things": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = image_pool(tmp_path / "second", {"grown-things": 5})
    for pool in (second, first, second):
        assert pool.evaluate(encoder())["grown-things"]["loss"] > 0


def test_tasks_that_would_share_a_head_are_told_before_heads_load(tmp_path: Path) -> None:
    names = {"Left-things": "nowhere", "left_things": "nowhere"}
    with pytest.raises(CartError, match="takes the tasks 'Left-things' and 'left_things' for one"):
        taskpool.ImageClassificationTaskPool(names, heads=names, processor=None)
    with pytest.raises(CartError, match=r"a task cannot be called 'v1\.5'"):
        taskpool.ImageClassificationTaskPool({"v1.5": None}, heads=names, processor=None)


def test_features_that_a_head_does_not_take_are_named(tmp_path: Path) -> None:
    pool = image_pool(tmp_path, {"wide-things": 2})
    with pytest.raises(CartError, match=r"'wide-things' takes 64 features, the model gives 96"):
        pool.evaluate(encoder(hidden_size=48))
    with pytest.raises(CartError, match="Linear has no `classifier`"):
        pool.evaluate(nn.Linear(2, 2))


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    missing = {"_target_": "datasets.load_from_disk", "dataset_path": str(tmp_path / "gone")}
    pool = image_pool(tmp_path, {"lost-things": 2}, test_datasets={"lost-things": missing})
    with pytest.raises(CartError, match=r"'lost-things' cannot be loaded: .*gone"):
        pool.evaluate(encoder())


def test_a_task_known_to_fusion_bench_keeps_its_class_names(tmp_path: Path) -> None:
    from fusion_bench.tasks.clip_classification import get_classnames

    before = get_classnames("mnist")
    image_pool(tmp_path, {"mnist": 10, "named-things": 3})
    assert get_classnames("mnist") == before
    assert get_classnames("named-things") == ["0", "1", "2"]


def test_lm_eval_returns_its_results_and_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(
        pools.save_language_model(tmp_path / "model"), dtype=torch.float32
    )
    pool = taskpool.LMEvalHarnessTaskPool(
        tasks="tiny_choice",
        include_path=str(pools.save_language_task(tmp_path / "tasks")),
        output_path=str(tmp_path / "written"),
        batch_size=2,
        log_samples=True,
        limit=4,
        bootstrap_iters=0,
    )
    report = pool.evaluate(model, limit=2)

    assert 0 <= report["results"]["tiny_choice"]["acc,none"] <= 1
    assert report["n-samples"]["tiny_choice"]["effective"] == 2
    assert json.loads(json.dumps(report)) == report
    written = {path.name.split("_")[0] for path in (tmp_path / "written").rglob("*.json*")}
    assert written == {"results", "samples"}
