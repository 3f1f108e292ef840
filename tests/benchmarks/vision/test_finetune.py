"""Heads, fine-tuning and evaluation, on a tiny encoder and a two-class task."""

import typing

import numpy as np
import pytest
import torch
import typing_extensions
from safetensors.torch import load_file, save_file

from benchmarks.common.cache import read_manifest
from benchmarks.common.heads import LOGIT_SCALE
from benchmarks.vision import finetune, heads
from benchmarks.vision.evaluate import accuracy, evaluate_encoder, load_encoder
from benchmarks.vision.finetune import FineTuning, finetune_task, load_head
from benchmarks.vision.splits import Split
from benchmarks.vision.tasks import load_split, prepare_task, training_sample
from tests.benchmarks.synthetic import tiny_encoder

QUICK = FineTuning(images=24, epochs=6, batch=8, learning_rate=1e-4, warmup=4)


def test_a_prototype_head_knows_its_own_images(tiny_suite):
    prepare_task("blocks")
    train = training_sample("blocks", 6, 0)
    model = tiny_encoder()
    head = heads.prototype_head(model, train, classes=2, shots=3)
    assert head.weight.shape == (2, 32)
    assert head.bias.shape == (2,)
    prototypes = torch.stack(
        [heads.all_features(model, train.images[train.labels == label]).mean(0) for label in (0, 1)]
    )
    own = head(prototypes).diagonal()
    assert torch.allclose(own.mean(), torch.tensor(LOGIT_SCALE), rtol=1e-4)


def test_a_class_with_too_few_images_for_a_prototype_is_named(tiny_suite):
    prepare_task("blocks")
    train = training_sample("blocks", 4, 0)
    with pytest.raises(ValueError, match="class 0 has 2 training examples; its"):
        heads.prototype_head(tiny_encoder(), train, classes=2, shots=3)


def test_fine_tuning_learns_the_task_and_leaves_a_whole_folder(tiny_suite):
    folder = finetune_task("blocks", 0, QUICK)
    manifest = read_manifest(folder)
    assert manifest["task"] == "blocks"
    assert manifest["epoch_losses"][-1] < manifest["epoch_losses"][0]
    pretrained = load_file(tiny_suite / "model.safetensors")
    assert pretrained.keys() == load_file(folder / "model.safetensors").keys()
    head = {"blocks": load_head("blocks", 0, QUICK)}
    assert evaluate_encoder(folder, head, "test")["blocks"] >= 0.8


def test_a_finished_task_is_not_trained_again(tiny_suite, monkeypatch):
    folder = finetune_task("blocks", 0, QUICK)
    monkeypatch.setattr(finetune, "train_encoder", None)
    assert finetune_task("blocks", 0, QUICK) == folder


def test_other_settings_or_seeds_have_other_folders(tiny_suite):
    folders = {
        finetune.encoder_folder("blocks", seed, FineTuning(epochs=epochs))
        for seed in (0, 1)
        for epochs in (1, 2)
    }
    assert len(folders) == 4


def test_training_that_is_cut_off_leaves_nothing_that_looks_finished(tiny_suite, monkeypatch):
    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_encoder", cut_off)
    with pytest.raises(KeyboardInterrupt):
        finetune_task("blocks", 0, QUICK)
    folder = finetune.encoder_folder("blocks", 0, QUICK)
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_the_same_seed_trains_the_same_weights(tiny_suite, monkeypatch, tmp_path):
    first = load_file(finetune_task("blocks", 0, QUICK) / "model.safetensors")
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "other"))
    again = load_file(finetune_task("blocks", 0, QUICK) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_accuracy_counts_right_answers(tiny_suite):
    prepare_task("blocks")
    data = load_split("blocks", "test")
    model = tiny_encoder()
    always_first = heads.Head(torch.zeros(2, 32), torch.tensor([1.0, 0.0]))
    three_of_four = Split(data.images[:8], np.array([0, 0, 0, 1] * 2), data.groups[:8])
    assert accuracy(model, always_first, three_of_four) == 0.75
    assert accuracy(model, always_first, three_of_four.head(3)) == 1.0


def test_an_encoder_that_lacks_tensors_is_not_evaluated(tiny_suite, tmp_path):
    weights = load_file(tiny_suite / "model.safetensors")
    lost = [name for name in weights if "attention.q_proj" in name]
    for path in tiny_suite.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {len(lost)} tensors of the encoder, for example"):
        load_encoder(tmp_path)


def check_classifier(model, folder):
    """The classifier's logits are those of encoder and head."""
    data = load_split("blocks", "test")
    with torch.no_grad():
        found = model(pixel_values=heads.pixels(data.images))
    expected = load_head("blocks", 0, QUICK)(heads.all_features(load_encoder(folder), data.images))
    logits = found if isinstance(found, torch.Tensor) else found.logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_encoder_and_head_together_are_a_classifier(tiny_suite):
    from transformers import AutoModelForImageClassification

    folder = finetune_task("blocks", 0, QUICK)
    model = AutoModelForImageClassification.from_pretrained(folder / "classifier").eval()
    check_classifier(model, folder)


def test_the_saved_processor_does_what_training_did(tiny_suite):
    from transformers import AutoImageProcessor

    folder = finetune_task("blocks", 0, QUICK)
    images = load_split("blocks", "test").images
    for place in (folder, folder / "classifier"):
        processor = AutoImageProcessor.from_pretrained(place)
        values = processor(list(images), return_tensors="pt")["pixel_values"]
        assert torch.allclose(values, heads.pixels(images), atol=1e-5)


def test_fusion_bench_loads_encoder_and_head(tiny_suite, monkeypatch):
    pools = pytest.importorskip("fusion_bench.modelpool")
    # FusionBench 0.2.33 takes `override` from typing, which has it from Python 3.12 on.
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    folder = finetune_task("blocks", 0, QUICK)
    pool = pools.Dinov2ForImageClassificationPool({"blocks": str(folder / "classifier")})
    check_classifier(pool.load_model("blocks").eval(), folder)
