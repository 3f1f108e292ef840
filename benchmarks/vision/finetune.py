"""One encoder a task, fine-tuned from the same start under a frozen prototype head.

    folder = finetune_task("thai", seed=0)  # trained once, then found again

The folder holds the encoder, which is what gets merged; `head/` holds the head alone, `classifier/`
both as a `Dinov2ForImageClassification` (its encoder weights are a link). A finished folder carries
a manifest with its settings; other settings, data or seed give another folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.training import Settings, finetune_missing, train_model
from benchmarks.vision.backbone import prepare_backbone, save_encoder
from benchmarks.vision.evaluate import load_encoder
from benchmarks.vision.heads import (
    LOGIT_SCALE,
    Head,
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


def encoder_folder(name: str, seed: int, settings: FineTuning) -> Path:
    """Where the task's fine-tuned encoder is kept, whether or not it is there."""
    return (
        cache_root()
        / "encoders"
        / f"seed{seed}"
        / f"{name}-{settings_hash(_identity(name, seed, settings))}"
    )


def _identity(name: str, seed: int, settings: FineTuning) -> dict[str, object]:
    return asdict(settings) | {
        "task": name,
        "data": prepare_task(name).name,
        "pretrained": prepare_backbone().name,
        "seed": seed,
        "logit_scale": LOGIT_SCALE,
    }


def finetune_task(
    name: str,
    seed: int,
    settings: FineTuning | None = None,
    row: int = 0,
    told: Callable[[float], None] | None = None,
) -> Path:
    """Fine-tune the pretrained encoder on a task unless that is done; return the encoder's folder.

    Args:
        name: the task.
        seed: draws the training images and their order.
        settings: of the training.
        row: line of the terminal for the progress bar.
        told: in the place of a bar, gets the share of the work that each step has done.
    """
    settings = settings or FineTuning()
    folder = encoder_folder(name, seed, settings)
    if read_manifest(folder) is not None:
        return folder
    train = training_sample(name, settings.images, seed)
    model = load_encoder(prepare_backbone())
    head = prototype_head(model, train, task(name).classes, settings.shots)
    losses = train_encoder(
        model, head, train, settings, seed, title=task(name).title, row=row, told=told
    )
    with new_folder(folder) as target:
        save_encoder(model, target)
        (target / "head").mkdir()
        head.save(target / "head")
        assemble_classifier(target, head, target / "classifier")
        write_json(target / MANIFEST, _identity(name, seed, settings) | {"epoch_losses": losses})
    return folder


def finetune_all(
    names: Sequence[str],
    seed: int,
    settings: FineTuning | Mapping[str, FineTuning] | None = None,
    workers: int = 2,
) -> dict[str, Path]:
    """Fine-tune several tasks, `workers` at a time (0: in this process); return their folders.

    The settings are those of all tasks, or of each by name.
    """
    if not isinstance(settings, Mapping):
        settings = dict.fromkeys(names, settings or FineTuning())
    chosen = {name: settings[name] for name in names}
    return finetune_missing(
        finetune_task, encoder_folder, chosen, lambda own: own.images, seed, workers
    )


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
    row: int = 0,
    told: Callable[[float], None] | None = None,
) -> list[float]:
    """Train the encoder in place (the head stays as it is); return each epoch's mean loss.

    The order of the images depends on `seed` only, and nothing else is random.
    """
    images, labels = pixels(train.images), torch.from_numpy(train.labels)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        logits = head(features(model, images[chosen]))
        return torch.nn.functional.cross_entropy(logits, labels[chosen])

    return train_model(model, loss, len(labels), settings, seed, title=title, row=row, told=told)
