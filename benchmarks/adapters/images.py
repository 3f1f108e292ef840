"""LoRA adapters of the vision suite's encoder, one a task and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters.loaded import Loaded
from benchmarks.common.heads import Head
from benchmarks.common.training import FineTuner, Shown, Trained
from benchmarks.vision import finetune
from benchmarks.vision.backbone import prepare_backbone
from benchmarks.vision.evaluate import accuracy, load_encoder
from benchmarks.vision.heads import prototype_head
from benchmarks.vision.strength import strength
from benchmarks.vision.tasks import SUITE, load_split, task, training_sample

MATRICES = ("query", "key", "value", "dense", "fc1", "fc2")  # all of a layer


@dataclass(frozen=True)
class LoraTuning(finetune.FineTuning):
    """Settings of an adapter's training; its start is drawn anew for every task.

    Args:
        rank: of the adapter's matrices; its scale is 2.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 16


def settings_of(name: str, rank: int) -> LoraTuning:
    """As many images and epochs as the suite's whole encoder of the task has seen."""
    whole = strength(name)
    return LoraTuning(images=whole.images, epochs=whole.epochs, rank=rank)


def _identity(name: str, seed: int, settings: LoraTuning) -> dict[str, object]:
    return finetune.identity(name, seed, settings) | {"matrices": list(MATRICES)}


def _train(name: str, seed: int, settings: LoraTuning, shown: Shown) -> Trained:
    from peft import LoraConfig, get_peft_model

    train = training_sample(name, settings.images, seed)
    encoder = load_encoder(prepare_backbone())
    head = prototype_head(encoder, train, task(name).classes, settings.shots)
    torch.manual_seed(seed + 1000 * (1 + SUITE.index(name)))  # for the adapter's start
    lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=list(MATRICES))
    model: Any = get_peft_model(encoder, lora)
    title = f"{task(name).title}, rank {settings.rank}"
    losses = finetune.train_encoder(model, head, train, settings, seed, title=title, shown=shown)

    def save(target: Path) -> None:
        model.save_pretrained(str(target / "adapter"))
        (target / "head").mkdir()
        head.save(target / "head")

    return losses, save


TUNER = FineTuner(
    place="image-adapters", settings=LoraTuning, examples="images", identity=_identity, train=_train
)


def load(seed: int, split: str, count: int, *, rank: int, tasks: Sequence[str] = SUITE) -> Loaded:
    """The adapters of a seed and rank, trained now if that has not been done.

    Args:
        seed: of the training.
        split: to judge on.
        count: images a task to judge on.
        rank: of the adapters.
        tasks: of the suite.
    """
    folders = TUNER.finetune_all(tasks, seed, {name: settings_of(name, rank) for name in tasks})
    heads: Mapping[str, Head] = {name: Head.load(folders[name] / "head") for name in tasks}
    data = {name: load_split(name, split).head(count) for name in tasks}

    def judge(model: Any, names: Sequence[str]) -> dict[str, float]:
        return {name: accuracy(model, heads[name], data[name]) for name in names}

    adapters = {name: folders[name] / "adapter" for name in tasks}
    return Loaded(load_encoder(prepare_backbone()), adapters, judge)
