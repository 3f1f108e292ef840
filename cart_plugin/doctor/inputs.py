"""What a model folder or weight file holds, from its headers: names, shapes, dtypes, no data."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mergekit.io import ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from cart_plugin.checkpoints.folders import DTYPES
from cart_plugin.doctor.findings import Finding, first_line, ok, problem, some, warning

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor; dtype is None if torch has no name for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.elements * (self.dtype.itemsize if self.dtype is not None else 1)

    @property
    def is_floating(self) -> bool:
        """Whether its values can be averaged: 8-bit floats cannot, the core rejects them."""
        return self.dtype is not None and self.dtype.is_floating_point and self.dtype.itemsize > 1

    @property
    def is_float8(self) -> bool:
        """Whether it holds floats of 8 bits, which mean little without scales of their own."""
        return self.dtype is not None and self.dtype.is_floating_point and self.dtype.itemsize == 1


@dataclass
class Checkpoint:
    """One input of a merge.

    Attributes:
        label: as the recipe writes it.
        path: its folder or weight file.
        tensors: by name, from the headers.
        model_type: from its config.json; empty for weight files.
    """

    label: str
    path: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    model_type: str = ""


def is_offline() -> bool:
    """Whether huggingface_hub has been told not to use the network."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def locate(path: str, kind: str) -> tuple[Path | None, list[Finding]]:
    """Find a model folder or file, downloading nothing.

    Args:
        path: as the recipe writes it, without revision.
        kind: what it is, for the messages: "model" or "adapter".

    Returns:
        The local path, if there is one, and what there is to say about it.
    """
    if os.path.exists(path):
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
            f"to have it checked: hf download {path} --local-dir FOLDER, and write FOLDER instead",
        )
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
    config_findings = _read_config(checkpoint)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return checkpoint, [
            problem(
                f"model {label} is a LoRA adapter without its model",
                f"write BASE_MODEL+{label} and pass --lora-merge-cache FOLDER to mergekit",
            )
        ]
    try:
        index = ShardedTensorIndex.from_disk(str(path))
    except Exception as error:  # no weights, truncated file, broken index
        return checkpoint, [*config_findings, _unreadable(label, path / "model.safetensors", error)]
    findings = list(config_findings)
    for shard in index.shards:
        file = path / shard.filename
        findings += _read_into(checkpoint, file)
        absent = [name for name in shard.contained_keys if name not in checkpoint.tensors]
        if file.is_file() and absent and not findings:
            findings.append(
                problem(
                    f"model {label}: {file.name} lacks {some(absent)}, which the index lists",
                    "copy or download the model again",
                )
            )
    return checkpoint, findings


def read_file(label: str, path: Path) -> tuple[Checkpoint, list[Finding]]:
    """Read the header of one weight file, as mergekit-pytorch needs it."""
    checkpoint = Checkpoint(label, path)
    if path.is_dir():
        return checkpoint, [
            problem(
                f"model {label} is a folder, mergekit-pytorch merges weight files",
                f"write {label.rstrip('/')}/model.safetensors, or folders only for mergekit-yaml",
            )
        ]
    return checkpoint, _read_into(checkpoint, path)


def check_adapter(adapter: str) -> list[Finding]:
    """Check the LoRA of a `model+lora` input; its shapes are PEFT's business."""
    path, findings = locate(adapter, "adapter")
    if path is not None and not (path / "adapter_config.json").is_file():
        findings.append(
            problem(
                f"adapter {adapter} has no adapter_config.json",
                "name the folder that PEFT's save_pretrained wrote",
            )
        )
    return findings


def check_dtypes(checkpoint: Checkpoint) -> list[Finding]:
    """Find weights that cannot be averaged: quantised ones, stored as integers or 8-bit floats."""
    weights = [
        name
        for name, info in checkpoint.tensors.items()
        if info.is_float8
        or (not info.is_floating and len(info.shape) >= 2 and not name.endswith("_ids"))
    ]
    if not weights:
        return []
    kinds = sorted({str(checkpoint.tensors[name].dtype or "packed") for name in weights})
    what = "quantised"
    if all(checkpoint.tensors[name].is_float8 for name in weights):
        what = "float8"
    return [
        problem(
            f"model {checkpoint.label} holds {', '.join(kinds)} weights ({some(weights)}); "
            f"{what} weights cannot be merged",
            "merge the original model, or dequantise this one and save it as bfloat16",
        )
    ]


def summary(checkpoint: Checkpoint) -> Finding:
    """One line on a readable checkpoint."""
    elements = sum(info.elements for info in checkpoint.tensors.values())
    kinds = sorted({str(info.dtype).removeprefix("torch.") for info in checkpoint.tensors.values()})
    return ok(
        f"model {checkpoint.label}: {len(checkpoint.tensors):,} tensors, "
        f"{elements / 1e6:,.4g} M parameters, {', '.join(kinds)}"
    )


def _read_config(checkpoint: Checkpoint) -> list[Finding]:
    file = checkpoint.path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        checkpoint.model_type = config.get("model_type", "")
    except FileNotFoundError:
        return [
            problem(
                f"model {checkpoint.label} has no config.json",
                "name a folder that save_pretrained wrote, or merge the weight files "
                "with mergekit-pytorch",
            )
        ]
    except (OSError, ValueError, AttributeError) as error:
        return [
            problem(
                f"model {checkpoint.label}: config.json cannot be read: {first_line(error)}",
                "copy or download the model again",
            )
        ]
    if len(config.get("architectures") or ()) != 1:
        return [
            problem(
                f"model {checkpoint.label}: config.json does not name one architecture",
                'add it, for example "architectures": ["LlamaForCausalLM"]',
            )
        ]
    return []


def _read_into(checkpoint: Checkpoint, file: Path) -> list[Finding]:
    try:
        if file.suffix == ".safetensors":
            _read_safetensors(checkpoint.tensors, file)
        else:
            _read_pickle(checkpoint.tensors, file)
    except Exception as error:  # missing, truncated or foreign file
        return [_unreadable(checkpoint.label, file, error)]
    return []


def _read_safetensors(tensors: dict[str, TensorInfo], file: Path) -> None:
    with safe_open(file, framework="pt") as header:
        for name in header.keys():  # noqa: SIM118 - safe_open is no mapping
            view = header.get_slice(name)
            tensors[name] = TensorInfo(tuple(view.get_shape()), DTYPES.get(view.get_dtype()))


def _read_pickle(tensors: dict[str, TensorInfo], file: Path) -> None:
    # On the meta device nothing of the data is kept, and weights_only runs no code of the file.
    state_dict = torch.load(file, map_location="meta", weights_only=True)
    for name, tensor in state_dict.get("state_dict", state_dict).items():
        if isinstance(tensor, torch.Tensor):
            tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)


def _unreadable(label: str, path: Path, error: Exception) -> Finding:
    if isinstance(error, SafetensorError):
        return problem(
            f"model {label}: {path.name} is not a whole safetensors file ({error})",
            "it was truncated or is still being written; copy or download it again",
        )
    if isinstance(error, FileNotFoundError):
        return problem(f"model {label}: {path.name} is missing", "copy or download the model again")
    if "Unable to find model files" in str(error):
        return problem(
            f"model {label} has no model.safetensors or pytorch_model.bin, nor their index",
            "name the folder that save_pretrained wrote, not its parent",
        )
    return problem(
        f"model {label}: {path.name} cannot be read: {first_line(error)}",
        "copy or download the model again, or save it as safetensors",
    )
