"""One encoder a task, fine-tuned from the same start under a frozen prototype head.

    folder = finetune_task("thai", seed=0)  # trained once, then found again

The folder holds the encoder, which is what gets merged; `head/` holds the head alone, `classifier/`
both as a `Dinov2ForImageClassification` (its encoder weights are a link). A finished folder carries
a manifest with its settings; other settings, data or seed give another folder.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from benchmarks.vision.backbone import prepare_backbone, save_encoder
from benchmarks.vision.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
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
class FineTuning:
    """Settings of fine-tuning: AdamW, a short warm-up, then linear decay to zero; no augmentation.

    Args:
        images: training images of the task.
        epochs: passes over them.
        batch: images a step.
        learning_rate: AdamW's, at its peak.
        warmup: steps of the warm-up (without it the first steps damage the pretrained features).
        clip: largest norm of the gradient.
        weight_decay: AdamW's.
        shots: images a class for the prototypes of the head.
    """

    images: int = 1600
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-4
    warmup: int = 10
    clip: float = 1.0
    weight_decay: float = 0.01
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


def finetune_task(name: str, seed: int, settings: FineTuning | None = None, row: int = 0) -> Path:
    """Fine-tune the pretrained encoder on a task unless that is done; return the encoder's folder.

    Args:
        name: the task.
        seed: draws the training images and their order.
        settings: of the training.
        row: line of the terminal for the progress bar.
    """
    settings = settings or FineTuning()
    folder = encoder_folder(name, seed, settings)
    if read_manifest(folder) is not None:
        return folder
    train = training_sample(name, settings.images, seed)
    model = load_encoder(prepare_backbone())
    head = prototype_head(model, train, task(name).classes, settings.shots)
    losses = train_encoder(model, head, train, settings, seed, title=task(name).title, row=row)
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

    The settings are those of all tasks, or of each by name. Each worker is a process with one
    thread: faster than one process with two threads, not slowed to a crawl by other work on the
    machine, and the result does not depend on the number of workers.
    """
    if not isinstance(settings, Mapping):
        settings = dict.fromkeys(names, settings or FineTuning())
    folders = {name: encoder_folder(name, seed, settings[name]) for name in names}
    todo = [name for name, folder in folders.items() if read_manifest(folder) is None]
    # The longest first: none is left to run alone in the end.
    todo.sort(key=lambda name: -settings[name].images * settings[name].epochs)
    if workers < 1:
        for name in todo:
            finetune_task(name, seed, settings[name])
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_one_thread) as pool:
            running = [
                pool.submit(finetune_task, name, seed, settings[name], row)
                for row, name in enumerate(todo)
            ]
            for future in running:
                future.result()
    return folders


def _one_thread() -> None:
    torch.set_num_threads(1)


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
) -> list[float]:
    """Train the encoder in place (the head stays as it is); return each epoch's mean loss.

    The order of the images depends on `seed` only, and nothing else is random.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = pixels(train.images), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * -(-len(labels) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / settings.warmup, 1 - step / steps)
    )
    model.train()
    losses = []
    with tqdm(
        total=steps, desc=f"fine-tune {title}", unit="step", leave=False, position=row
    ) as bar:
        for _ in range(settings.epochs):
            total = 0.0
            for chosen in torch.randperm(len(labels), generator=generator).split(settings.batch):
                loss = torch.nn.functional.cross_entropy(
                    head(features(model, images[chosen])), labels[chosen]
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}")
            losses.append(total / len(labels))
    model.eval()
    return losses
