"""The loop that fine-tunes the encoders of the suites, in processes of one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)


@dataclass(frozen=True)
class Settings:
    """How a model is trained; what it is trained on is each suite's to add.

    Args:
        epochs: passes over the examples.
        batch: examples a step.
        learning_rate: AdamW's, at its peak.
        warmup: steps of the warm-up (without it the first steps damage the pretrained features).
        clip: largest norm of the gradient.
        weight_decay: AdamW's.
    """

    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-4
    warmup: int = 10
    clip: float = 1.0
    weight_decay: float = 0.01


S = TypeVar("S", bound=Settings)
# Where training shows how far it is: a line of the terminal for its bar, or, in the place of a bar,
# what takes the share of the work that each step has done.
Shown = int | Callable[[float], None]


def train_model(
    model: torch.nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    settings: Settings,
    seed: int,
    title: str = "task",
    shown: Shown = 0,
) -> list[float]:
    """Train a model in place by AdamW: a short warm-up, then linear decay to zero.

    Args:
        model: trained whole; left in eval mode.
        loss_of: mean loss of the examples at these positions.
        count: number of examples.
        settings: see `Settings`.
        seed: decides the order of the examples; nothing else is random.
        title: of the progress bar.
        shown: where the progress is shown.

    Returns:
        Each epoch's mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over the memory in the place of ten: a tenth of a small model's step
    )
    steps = settings.epochs * -(-count // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / settings.warmup, 1 - step / steps)
    )
    model.train()
    losses = []
    with tqdm(
        total=steps,
        desc=f"fine-tune {title}",
        unit="step",
        leave=False,
        position=shown if isinstance(shown, int) else None,
        disable=not isinstance(shown, int),
    ) as bar:
        for _ in range(settings.epochs):
            total = 0.0
            for chosen in torch.randperm(count, generator=generator).split(settings.batch):
                loss = loss_of(chosen)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}")
                if not isinstance(shown, int):
                    shown(1 / steps)
            losses.append(total / count)
    model.eval()
    return losses


Trained = tuple[list[float], Callable[[Path], None]]


@dataclass(frozen=True, kw_only=True)
class FineTuner(Generic[S]):
    """Fine-tunes one model a task, once: what is done is found again by all that decides it.

    Args:
        place: folder of the cache.
        settings: their class; its defaults are the suite's.
        examples: the setting that says how many of a task it trains on.
        identity: all that decides a model: of a task, a seed and settings; names its folder.
        train: takes the same and where to show progress; returns each epoch's mean loss, and what
            writes the model into a folder.
    """

    place: str
    settings: type[S]
    examples: str
    identity: Callable[[str, int, S], dict[str, object]]  # no lambdas: they go to processes
    train: Callable[[str, int, S, Shown], Trained]

    def folder(self, name: str, seed: int, settings: S) -> Path:
        """Where the task's fine-tuned model is kept, whether or not it is there."""
        own = settings_hash(self.identity(name, seed, settings))
        return cache_root() / self.place / f"seed{seed}" / f"{name}-{own}"

    def finetune(self, name: str, seed: int, settings: S | None = None, shown: Shown = 0) -> Path:
        """Fine-tune the pretrained model on a task unless that is done; return the folder.

        Args:
            name: the task.
            seed: draws the training examples and their order.
            settings: of the training.
            shown: where the progress is shown.
        """
        settings = settings or self.settings()
        folder = self.folder(name, seed, settings)
        if read_manifest(folder) is not None:
            return folder
        losses, save = self.train(name, seed, settings, shown)
        with new_folder(folder) as target:
            save(target)
            manifest = self.identity(name, seed, settings) | {"epoch_losses": losses}
            write_json(target / MANIFEST, manifest)
        return folder

    def finetune_all(
        self,
        names: Sequence[str],
        seed: int,
        settings: S | Mapping[str, S] | None = None,
        workers: int = 2,
    ) -> dict[str, Path]:
        """Fine-tune the tasks that are not done; return the folders of all.

        Args:
            names: the tasks.
            seed: of the fine-tuning.
            settings: of all tasks, or of each by name.
            workers: see `in_processes`.
        """
        if not isinstance(settings, Mapping):
            settings = dict.fromkeys(names, settings or self.settings())
        folders = {name: self.folder(name, seed, settings[name]) for name in names}
        todo = [name for name, folder in folders.items() if read_manifest(folder) is None]
        # The longest first: none is left to run alone in the end.
        steps = {
            name: getattr(settings[name], self.examples) * settings[name].epochs for name in todo
        }
        todo.sort(key=lambda name: -steps[name])
        jobs = [
            partial(self.finetune, name, seed, settings[name], row) for row, name in enumerate(todo)
        ]
        in_processes(jobs, workers)
        return folders


def in_processes(jobs: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """Do jobs, `workers` at a time (0: in this process); return their results in order.

    Each worker is a process with one thread: faster than one process with two threads, not slowed
    to a crawl by other work on the machine, and results do not depend on the number of workers.
    """
    if workers < 1 or not jobs:
        return [job() for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=one_thread) as pool:
        return [running.result() for running in [pool.submit(job) for job in jobs]]


def one_thread() -> None:
    """Keep this process's torch to one thread."""
    torch.set_num_threads(1)
