"""One MiniLM a text task, fine-tuned from the same start under a frozen prototype head.

    folder = finetune_task("newsgroups", seed=0)  # trained once, then found again

The folder holds the encoder with its tokenizer, which is what gets merged. The head is the same for
every seed, and made anew where it is needed (`task_head`).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.heads import LOGIT_SCALE, Head, first_of_each, head_of
from benchmarks.common.training import FineTuner, Settings, Shown, Trained, train_model
from benchmarks.text.backbone import SOURCE, prepare_backbone
from benchmarks.text.encoder import TOKENS, all_features, features, load_encoder, load_tokenizer
from benchmarks.text.tasks import load_split, prepare_task, task, training_sample


@dataclass(frozen=True)
class FineTuning(Settings):
    """Settings of fine-tuning.

    Args:
        texts: training texts of the task.
        shots: texts a class for the prototypes of the head.
    """

    texts: int = 4000
    shots: int = 3


def _identity(name: str, seed: int, settings: FineTuning) -> dict[str, object]:
    return asdict(settings) | {
        "task": name,
        "data": prepare_task(name).name,
        "pretrained": f"{SOURCE.name}-{SOURCE.version}",
        "seed": seed,
        "logit_scale": LOGIT_SCALE,
        "tokens": TOKENS,
    }


def task_head(name: str, settings: FineTuning) -> Head:
    """The frozen head of a task: prototypes of its first training texts, the same for all seeds."""
    return Head.load(task_head_folder(name, settings))


def task_head_folder(name: str, settings: FineTuning) -> Path:
    """The folder of a task's head; made once, then found again: every evaluation needs them all."""
    identity = {"shots": settings.shots} | {
        key: value
        for key, value in _identity(name, 0, settings).items()
        if key in ("task", "data", "pretrained", "logit_scale", "tokens")
    }
    folder = cache_root() / "text-heads" / f"{name}-{settings_hash(identity)}"
    if read_manifest(folder) is None:
        with new_folder(folder) as target:
            _prototype_head(name, settings.shots).save(target)
            write_json(target / MANIFEST, identity)
    return folder


def _prototype_head(name: str, shots: int) -> Head:
    train = load_split(name, "train")
    classes = task(name).classes
    chosen = first_of_each(train.labels, classes, shots)
    backbone = prepare_backbone()
    texts = [train.texts[position] for position in chosen]
    found = all_features(load_encoder(backbone), load_tokenizer(backbone), texts)
    return head_of(found.view(classes, shots, -1).mean(dim=1))


def _train(name: str, seed: int, settings: FineTuning, shown: Shown) -> Trained:
    train = training_sample(name, settings.texts, seed)
    head = task_head(name, settings)
    backbone = prepare_backbone()
    model, tokenizer = load_encoder(backbone), load_tokenizer(backbone)
    labels = torch.from_numpy(train.labels)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        texts = [train.texts[position] for position in chosen.tolist()]
        logits = head(features(model, tokenizer, texts))
        return torch.nn.functional.cross_entropy(logits, labels[chosen])

    def save(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        shutil.copy2(backbone / "config.json", target)  # with its dropout

    title = task(name).title
    return train_model(model, loss, len(labels), settings, seed, title=title, shown=shown), save


TUNER = FineTuner(
    place="text-encoders", settings=FineTuning, examples="texts", identity=_identity, train=_train
)
encoder_folder, finetune_task, finetune_all = TUNER.folder, TUNER.finetune, TUNER.finetune_all
