"""One encoder a task, fine-tuned from the same start under a frozen prototype head.

    folder = finetune_task("thai", seed=0)  # trained once, then found again

The folder holds the encoder, which is what gets merged; `head/` holds the head alone, `classifier/`
both as a `Dinov2ForImageClassification` (its encoder weights are a link). A finished folder carries
a manifest with its settings; other settings, data or seed give another folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common.heads import LOGIT_SCALE, Head
from benchmarks.common.training import FineTuner, Settings, Shown, Trained, train_model
from benchmarks.vision.backbone import prepare_backbone, save_encoder
from benchmarks.vision.evaluate import load_encoder
from benchmarks.vision.heads import (
    assemble_classifier,
    features,
    pixels,
    prototype_head,
)
from benchmarks.vision.splits import Split
from benchmarks.vision.tasks import prepare_task, task, training_sample

if TYPE_CHECKING:
    from transformers import Dinov2Model


@dataclass(frozen=True)
class FineTuning(Settings):
    """Settings of fine-tuning: AdamW, a short warm-up, then linear decay to zero; no augmentation.

    Args:
        images: training images of the task.
        shots: images a class for the prototypes of the head.
    """

    images: int = 1600
    shots: int = 3


def identity(name: str, seed: int, settings: FineTuning) -> dict[str, object]:
    """All that decides a model."""
    return asdict(settings) | {
        "task": name,
        "data": prepare_task(name).name,
        "pretrained": prepare_backbone().name,
        "seed": seed,
        "logit_scale": LOGIT_SCALE,
    }


def _train(name: str, seed: int, settings: FineTuning, shown: Shown) -> Trained:
    train = training_sample(name, settings.images, seed)
    model = load_encoder(prepare_backbone())
    head = prototype_head(model, train, task(name).classes, settings.shots)
    losses = train_encoder(model, head, train, settings, seed, title=task(name).title, shown=shown)

    def save(target: Path) -> None:
        save_encoder(model, target)
        (target / "head").mkdir()
        head.save(target / "head")
        assemble_classifier(target, head, target / "classifier")

    return losses, save


TUNER = FineTuner(
    place="encoders", settings=FineTuning, examples="images", identity=identity, train=_train
)
encoder_folder, finetune_task, finetune_all = TUNER.folder, TUNER.finetune, TUNER.finetune_all


def load_head(name: str, seed: int, settings: FineTuning | None = None) -> Head:
    """The frozen head of a fine-tuned task."""
    return Head.load(encoder_folder(name, seed, settings or FineTuning()) / "head")


def train_encoder(
    model: Dinov2Model,
    head: Head,
    train: Split,
    settings: FineTuning,
    seed: int,
    title: str = "task",
    shown: Shown = 0,
) -> list[float]:
    """Train the encoder in place (the head stays as it is); return each epoch's mean loss.

    The order of the images depends on `seed` only, and nothing else is random.
    """
    images, labels = pixels(train.images), torch.from_numpy(train.labels)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        logits = head(features(model, images[chosen]))
        return torch.nn.functional.cross_entropy(logits, labels[chosen])

    return train_model(model, loss, len(labels), settings, seed, title=title, shown=shown)
