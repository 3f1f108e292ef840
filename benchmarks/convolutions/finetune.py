"""One EfficientNet a task, fine-tuned from the same start under a frozen prototype head.

The images are the vision suite's, enlarged, and the heads are made as its are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common.heads import LOGIT_SCALE, Head, first_of_each, head_of
from benchmarks.common.training import FineTuner, Settings, Shown, Trained, train_model
from benchmarks.convolutions.backbone import IMAGE_SIZE, SOURCE, load_backbone, weights_of
from benchmarks.vision.heads import pixels
from benchmarks.vision.splits import Split
from benchmarks.vision.tasks import prepare_task, task, training_sample

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class FineTuning(Settings):
    """Settings of fine-tuning; batch norms see batches of the task, and keep their statistics.

    Args:
        images: training images of the task.
        shots: images a class for the prototypes of the head.
    """

    epochs: int = 4
    learning_rate: float = 3e-4
    images: int = 1600
    shots: int = 3


def enlarged(images: np.ndarray) -> Tensor:
    """uint8 (N, 56, 56, 3) -> normalised fp32 (N, 3, 112, 112)."""
    return nn.functional.interpolate(
        pixels(images), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=False
    )


@torch.no_grad()
def all_features(model: nn.Module, images: np.ndarray, batch: int = 50) -> Tensor:
    """Features (N, 1280) of uint8 images (N, h, w, 3), in batches."""
    return torch.cat(
        [model(enlarged(images[at : at + batch])) for at in range(0, len(images), batch)]
    )


def accuracy(model: nn.Module, head: Head, data: Split) -> float:
    """Share of the images that encoder and head classify rightly, between 0 and 1."""
    right = head(all_features(model, data.images)).argmax(dim=1) == torch.from_numpy(data.labels)
    return right.double().mean().item()


def _identity(name: str, seed: int, settings: FineTuning) -> dict[str, object]:
    return asdict(settings) | {
        "task": name,
        "data": prepare_task(name).name,
        "pretrained": f"{SOURCE.name}-{SOURCE.version}",
        "seed": seed,
        "logit_scale": LOGIT_SCALE,
        "size": IMAGE_SIZE,
    }


def _train(name: str, seed: int, settings: FineTuning, shown: Shown) -> Trained:
    train = training_sample(name, settings.images, seed)
    model = load_backbone()
    classes = task(name).classes
    chosen = train.images[first_of_each(train.labels, classes, settings.shots)]
    head = head_of(all_features(model, chosen).view(classes, settings.shots, -1).mean(dim=1))
    labels = torch.from_numpy(train.labels)

    def loss(positions: Tensor) -> Tensor:
        logits = head(model(enlarged(train.images[positions.numpy()])))
        return nn.functional.cross_entropy(logits, labels[positions])

    def save(target: Path) -> None:
        save_file(weights_of(model), target / WEIGHTS)
        (target / "head").mkdir()
        head.save(target / "head")

    title = task(name).title
    return train_model(model, loss, len(labels), settings, seed, title=title, shown=shown), save


TUNER = FineTuner(
    place="conv-encoders", settings=FineTuning, examples="images", identity=_identity, train=_train
)
finetune_all = TUNER.finetune_all
