"""What a user of a compression has to know, as notes of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints import configs
from cart_plugin.compress.inputs import random_weights
from cart_plugin.compress.report import ALL_OF_IT, Report
from cart_plugin.compress.work import Work


def of_names(report: Report, paths: Sequence[Path]) -> None:
    """Say which adapters have another name than their models' folders."""
    folders = (path.resolve().name for path in paths)
    pairs = zip(folders, report.tasks, strict=True)
    renamed = [f"{task} ({folder})" for folder, task in pairs if task != folder]
    if renamed:
        report.notes.append(
            f"PEFT takes no dots in adapters' names; these are called {', '.join(renamed)}"
        )


def of_left(report: Report) -> None:
    """Say what stays at the base, why, and what that loses."""
    for left in report.left_out():
        error = f"at most {left.error:.1e}" if left.error is not None else f"{ALL_OF_IT} (of zeros)"
        report.notes.append(
            f"{len(left.names)} tensors, such as {left.names[0]}, stay at the {report.center} "
            f"({left.reason}): {left.bytes:,} bytes of each model, relative error "
            f"{error}, {left.of_lost:.1%} of all that is lost"
        )


def of_silent(report: Report) -> None:
    """Warn of who takes the adapters and answers wrongly."""
    for loader in report.loaders:
        if loader.silent:
            report.notes.append(
                f"give these adapters not to {loader.name}: {'; '.join(loader.reasons)}. "
                "layout='servers' (--layout servers) writes what it takes"
            )


def of_files(report: Report) -> None:
    """Say which tasks have files of tokenizer and the like that PEFT does not give them."""
    found: dict[str, list[str]] = {}
    rows = zip(report.tasks, report.task_files, report.absent_files, strict=True)
    for task, different, absent in rows:
        if different or absent:
            found.setdefault(", ".join(sorted([*different, *absent])), []).append(task)
    for names, held in found.items():
        report.notes.append(
            f"{names} of {', '.join(held)} differ from the base's: `mergekit-cart expand` gives "
            "every model its own, but who loads an adapter with PEFT gets the base's"
        )


def of_weights(work: Work, own_heads: Sequence[str]) -> None:
    """Say where a config and the weights disagree in what can be kept as it is.

    Raises:
        CartError: a config describes more layers than there are weights.
    """
    if own_heads:
        work.report.notes.append(
            f"the configs tie {' and '.join(own_heads)}, but files hold different values for them, "
            "which transformers loads: the base's config says tie_word_embeddings: false"
        )
    configs_seen: list[dict[str, Any]] = []
    for model in (work.described, *work.models):
        if model.config in configs_seen:
            continue
        configs_seen.append(model.config)
        missing = random_weights(model)
        if missing:
            work.report.notes.append(
                f"no file of {model.name} holds {missing[0]}"
                + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else "")
                + ": transformers fills them at random, in the base as in the models"
            )


def of_configs(work: Work) -> None:
    """Say which models' configs differ from the base's: PEFT runs all adapters with that."""
    base = work.described
    keys: dict[str, None] = {}
    held = []
    for model in work.models:
        different = configs.differences([base, model]) if model is not base else []
        if different:
            held.append(model.name)
            keys.update(dict.fromkeys(entry.key for entry in different))
    if held:
        work.report.notes.append(
            f"the config of {', '.join(held)} differs from the base's in {', '.join(keys)}: "
            "`mergekit-cart expand` gives every model its own, but PEFT runs the adapters with the "
            "base's and may answer otherwise"
        )
