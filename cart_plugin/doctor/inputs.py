"""Checks of a recipe's inputs: where they are, and whether their files are whole and mergeable."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex

from cart_plugin.checkpoints import hub
from cart_plugin.checkpoints.agreement import quantised_fact
from cart_plugin.checkpoints.headers import (
    WEIGHT_SUFFIXES,
    is_lfs_pointer,
    read_header,
    unreadable,
)
from cart_plugin.checkpoints.reading import (
    ADAPTER_CONFIG,
    CONFIG,
    MERGEKIT_ORDER,
    Checkpoint,
    read_config,
    read_weights,
)
from cart_plugin.checkpoints.side_files import side_files
from cart_plugin.doctor.findings import Finding, ok, problem, warning
from cart_plugin.errors import CheckpointError
from cart_plugin.wording import some

MAPPING = '`model: {{model: {{path: "{}"}}}}`'
"""How a recipe names a folder with a sign in its name that means something to mergekit."""


def is_offline() -> bool:
    """Whether huggingface_hub has been told not to use the network."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def locate(path: str, kind: str, revision: str | None = None) -> tuple[Path | None, list[Finding]]:
    """Find a model folder or file, downloading nothing.

    Args:
        path: as the recipe writes it, without revision.
        kind: what it is, for the messages: "model" or "adapter".
        revision: that the recipe asks for.

    Returns:
        The local path, if there is one, and what there is to say about it.
    """
    try:
        os.stat(path)
    except PermissionError as error:
        return None, _refused(unreadable(Path(path), kind, error))
    except (OSError, ValueError):
        pass  # it is not there, or no path at all
    else:
        return Path(path), []
    if path.startswith("~"):
        return None, [
            problem(
                f"{kind} {path}: mergekit does not expand `~`", f"write {os.path.expanduser(path)}"
            )
        ]
    if path.startswith((".", "/")) or path.count("/") > 1 or path.endswith(WEIGHT_SUFFIXES):
        return None, [
            problem(
                f"{kind} {path} does not exist",
                "correct the path; relative ones start at the folder in which mergekit is run",
            )
        ]
    if is_offline():
        return None, [
            problem(
                f"{kind} {path} is not a local folder and HF_HUB_OFFLINE is set; mergekit asks the "
                "hub for its files even if they are cached",
                "download it and write the folder's path",
            )
        ]
    return None, [
        warning(
            f"{kind} {path} is not a local folder; mergekit will take it for a Hugging Face id. "
            "Not checked: only local folders are",
            f"to have it checked: {to_folder(path, revision)}, and write FOLDER instead",
        )
    ]


def to_folder(path: str, revision: str | None) -> str:
    """The command that brings a model of the hub here."""
    return f"{hub.download(path if revision is None else f'{path}@{revision}')} --local-dir FOLDER"


def check_split(label: str, model: ModelReference) -> list[Finding]:
    """Find folders whose names mergekit splits into a model and an adapter, or a revision."""
    wholes = {"+": (label, model.lora is not None)}
    for part in (model.model, model.lora):
        if part is not None and part.revision is not None:
            wholes["@"] = (str(part), True)
    return [
        problem(
            f"{whole} is a folder, but mergekit reads `{sign}` in it as the sign "
            f"{'between a model and its adapter' if sign == '+' else 'before a revision'}",
            f"write it as a mapping, {MAPPING.format(whole)}, or rename the folder",
        )
        for sign, (whole, is_split) in wholes.items()
        if is_split and os.path.exists(whole)
    ]


def check_model_card(path: str) -> list[Finding]:
    """Find paths that mergekit's model card takes for hub ids, which fails offline."""
    from huggingface_hub.errors import HFValidationError

    # Public, but exported in a way that mypy does not follow.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not is_offline() or os.path.isabs(path) or path.count("/") > 1:
        return []
    try:
        validate_repo_id(path)
    except HFValidationError:
        return []
    return [
        warning(
            f"{path} looks like a Hugging Face id: offline, mergekit fails on its model card when "
            "the merge is done",
            f"write {os.path.abspath(path)} or ./{path}, or pass --no-write-model-card",
        )
    ]


def read_folder(label: str, path: Path) -> tuple[Checkpoint, list[Finding]]:
    """Read the headers of a model folder, as mergekit-yaml needs it.

    Args:
        label: the model as the recipe writes it; of `model+lora`, only the model is read.
        path: its folder.

    Returns:
        The checkpoint (empty if unreadable) and the problems found.
    """
    checkpoint = Checkpoint(label, path)
    if path.is_file():
        return checkpoint, [
            problem(
                f"model {label} is a file, mergekit-yaml merges folders",
                "name the folder, or write weight files for all models and run mergekit-pytorch",
            )
        ]
    try:
        os.stat(path / CONFIG)
    except PermissionError as error:
        return checkpoint, _refused(unreadable(path, f"model {label}", error))
    except OSError:
        pass  # reported below
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        return checkpoint, [
            problem(
                f"model {label} is a LoRA adapter without its model",
                f"write BASE_MODEL+{label} and pass --lora-merge-cache FOLDER to mergekit",
            )
        ]
    findings = _check_config(checkpoint)
    findings += _unreadable(lambda: read_weights(checkpoint, MERGEKIT_ORDER))
    findings += _check_pointers(checkpoint)
    return checkpoint, findings


def read_file(label: str, path: Path) -> tuple[Checkpoint, list[Finding]]:
    """Read the header of one weight file, as mergekit-pytorch needs it."""
    checkpoint = Checkpoint(label, path, files=[path])
    if path.is_dir():
        return checkpoint, [
            problem(
                f"model {label} is a folder, mergekit-pytorch merges weight files",
                f"write {label.rstrip('/')}/model.safetensors, or folders only for mergekit-yaml",
            )
        ]
    return checkpoint, _unreadable(
        lambda: checkpoint.tensors.update(read_header(path, f"model {label}"))
    )


def _check_pointers(checkpoint: Checkpoint) -> list[Finding]:
    """Find what a clone without Git LFS has in the place of tokenizers and the like."""
    left = [
        name
        for name, file in side_files(checkpoint.path).items()
        if os.access(file, os.R_OK) and is_lfs_pointer(file)
    ]
    if not left:
        return []
    return [
        problem(
            f"model {checkpoint.name}: {some(left)} {'is a' if len(left) == 1 else 'are'} Git LFS "
            f"pointer{'' if len(left) == 1 else 's'}, and would be so in the result",
            "run `git lfs pull` in the folder, or download the model (hf download)",
        )
    ]


def check_format(checkpoint: Checkpoint) -> list[Finding]:
    """Find pickles that one of mergekit's flags cannot read."""
    old = [
        file.name
        for file in checkpoint.files
        if file.suffix != ".safetensors" and not zipfile.is_zipfile(file)
    ]
    if not old:
        return []
    return [
        warning(
            f"model {checkpoint.name}: {some(old)} is in the format of torch before 1.6, at which "
            "mergekit stops with --lazy-unpickle",
            "do not pass that flag, or save the model as safetensors",
        )
    ]


def check_adapter(adapter: str, revision: str | None = None) -> list[Finding]:
    """Check the LoRA of a `model+lora` input; its shapes are PEFT's business."""
    path, findings = locate(adapter, "adapter", revision)
    if path is not None and not (path / ADAPTER_CONFIG).is_file():
        findings.append(
            problem(
                f"adapter {adapter} has no adapter_config.json",
                "name the folder that PEFT's save_pretrained wrote",
            )
        )
    return findings


def check_dtypes(checkpoint: Checkpoint) -> list[Finding]:
    """Find weights that cannot be averaged: quantised ones, stored as integers or 8-bit floats."""
    found = quantised_fact(checkpoint)
    return [] if found is None else [problem(*found)]


def summary(checkpoint: Checkpoint) -> Finding:
    """One line on a readable checkpoint."""
    elements = sum(info.elements for info in checkpoint.tensors.values())
    kinds = sorted({str(info.dtype).removeprefix("torch.") for info in checkpoint.tensors.values()})
    return ok(
        f"model {checkpoint.name}: {len(checkpoint.tensors):,} tensors, "
        f"{elements / 1e6:,.4g} M parameters, {', '.join(kinds)}"
    )


def _check_config(checkpoint: Checkpoint) -> list[Finding]:
    label = checkpoint.name
    if not (checkpoint.path / CONFIG).is_file():
        return [
            problem(
                f"model {label} has no {CONFIG}",
                "name a folder that save_pretrained wrote, or merge the weight files "
                "with mergekit-pytorch",
            )
        ]

    def read() -> None:
        checkpoint.config = read_config(checkpoint.path, f"model {label}")

    broken = _unreadable(read)
    architectures = checkpoint.config.get("architectures")
    if not broken and not (isinstance(architectures, list) and len(architectures) == 1):
        return [
            problem(
                f"model {label}: {CONFIG} does not name one architecture",
                'add it, for example "architectures": ["LlamaForCausalLM"]',
            )
        ]
    return broken


def _unreadable(read: Callable[[], None]) -> list[Finding]:
    """Read something; what stops that, as a finding."""
    try:
        read()
    except CheckpointError as error:
        return _refused(error)
    return []


def _refused(error: CheckpointError) -> list[Finding]:
    return [problem(error.fact, error.advice)]


def values(checkpoint: Checkpoint, *, lazy_unpickle: bool = False) -> LazyTensorLoader:
    """What reads the tensors of a folder's checkpoint, safetensors or pickled."""
    index = ShardedTensorIndex.from_disk(str(checkpoint.path))
    return LazyTensorLoader(index, lazy_unpickle=lazy_unpickle)
