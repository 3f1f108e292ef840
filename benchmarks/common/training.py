"""The loop that fine-tunes the encoders of the suites, in processes of one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.common.cache import read_manifest


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


def train_model(
    model: torch.nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    settings: Settings,
    seed: int,
    title: str = "task",
    row: int = 0,
    told: Callable[[float], None] | None = None,
) -> list[float]:
    """Train a model in place by AdamW: a short warm-up, then linear decay to zero.

    Args:
        model: trained whole; left in eval mode.
        loss_of: mean loss of the examples at these positions.
        count: number of examples.
        settings: see `Settings`.
        seed: decides the order of the examples; nothing else is random.
        title: of the progress bar.
        row: its line of the terminal.
        told: in the place of a bar, gets the share of the work that each step has done.

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
        position=row,
        disable=told is not None,
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
                if told is not None:
                    told(1 / steps)
            losses.append(total / count)
    model.eval()
    return losses


def finetune_missing(
    finetune_task: Callable[[str, int, S, int], object],
    folder_of: Callable[[str, int, S], Path],
    settings: Mapping[str, S],
    examples: Callable[[S], int],
    seed: int,
    workers: int,
) -> dict[str, Path]:
    """Fine-tune the tasks that are not done, `workers` at a time; return the folders of all.

    Args:
        finetune_task: of a suite; takes task, seed, settings and the progress bar's line.
        folder_of: where a task's result is kept, whether or not it is there.
        settings: of each task, by name.
        examples: how many of a task these settings train on.
        seed: of the fine-tuning.
        workers: see `in_processes`.
    """
    folders = {name: folder_of(name, seed, own) for name, own in settings.items()}
    todo = [name for name, folder in folders.items() if read_manifest(folder) is None]
    # The longest first: none is left to run alone in the end.
    todo.sort(key=lambda name: -examples(settings[name]) * settings[name].epochs)
    in_processes(
        [partial(finetune_task, name, seed, settings[name], row) for row, name in enumerate(todo)],
        workers,
    )
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
