"""Ways to store T fine-tuned encoders in less than T times their size, and what comes back.

What the plugin and mergekit write is taken from their files, byte for byte; what has no file format
of its own (rounding, masks) is counted as if it were packed without any overhead.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.suites import Encoders
from cart_plugin.compress import compress, load_task

REVISION = 1  # raised when a way to store gives other models or counts other bytes
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
GROUP = 64  # weights that share a scale in rounding


@dataclass(frozen=True)
class Stored:
    """All encoders in one of the ways.

    Attributes:
        bytes: of everything that is needed to have all encoders.
        restored: a task's tensors.
    """

    bytes: int
    restored: Callable[[str], Mapping[str, Tensor]]


def models_bytes(encoders: Encoders) -> int:
    """Of the weight files of all encoders."""
    return sum((folder / WEIGHTS).stat().st_size for folder in encoders.folders.values())


def whole(encoders: Encoders) -> Stored:
    """All encoders as they are."""
    return Stored(models_bytes(encoders), encoders.tuned.__getitem__)


def averaged(encoders: Encoders) -> Stored:
    """One encoder for all tasks, their average."""
    average = encoders.average()
    return Stored(models_bytes(encoders) // len(encoders.tuned), lambda _: average)


def indexed(encoders: Encoders, work: Path, *, around_base: bool = False, **options: Any) -> Stored:
    """What `mergekit-cart compress` writes, and `expand` gives back.

    Args:
        encoders: to store.
        work: an empty folder.
        around_base: around the pretrained encoder rather than the average.
        options: of `cart_plugin.compress.compress`.
    """
    base = encoders.pretrained if around_base else None
    tasks = list(encoders.folders)
    report = compress(list(encoders.folders.values()), work, names=tasks, base=base, **options)
    return Stored(report.bytes, lambda task: load_task(work, task))


def extract_command(
    model: Path, base: Path, out: Path, rank: int, *, matrices_only: bool = False
) -> list[str]:
    """`mergekit-extract-lora` for one model.

    By its defaults it stores embedding tables and norms whole; with `matrices_only` it leaves them
    out, as `compress` does with a `small_error` that is above all of theirs.
    """
    program = str(Path(sys.executable).with_name("mergekit-extract-lora"))
    options = {"--model": model, "--base-model": base, "--out-path": out, "--max-rank": rank}
    words = [str(word) for option in options.items() for word in option]
    more = ["--skip-undecomposable", "--exclude-regex", "embeddings"] if matrices_only else []
    return [program, *words, *more]


def extracted(encoders: Encoders, work: Path, *, rank: int, matrices_only: bool = False) -> Stored:
    """What `mergekit-extract-lora` writes, an adapter a model, around the pretrained encoder.

    Args:
        encoders: to store.
        work: an empty folder.
        rank: of all adapters.
        matrices_only: see `extract_command`.

    Raises:
        RuntimeError: it fails; with its last line.
    """
    for task, folder in encoders.folders.items():
        command = extract_command(
            folder, encoders.pretrained, work / task, rank, matrices_only=matrices_only
        )
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
    base = load_file(encoders.pretrained / WEIGHTS)
    sizes = [(work / task / ADAPTER).stat().st_size for task in encoders.folders]

    def restored(task: str) -> dict[str, Tensor]:
        adapter = load_file(work / task / ADAPTER)
        return {name: with_adapter(name, base[name], adapter) for name in encoders.tuned[task]}

    return Stored((encoders.pretrained / WEIGHTS).stat().st_size + sum(sizes), restored)


def with_adapter(name: str, tensor: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """A tensor with all that an extracted adapter's file holds for it.

    That is more than PEFT loads: mergekit 0.1.5 writes differences of biases without `lora_bias` in
    the config.
    """
    path = f"base_model.model.{name}"
    if path in adapter:
        return adapter[path]
    module, _, leaf = path.rpartition(".")
    if leaf == "bias" and f"{module}.lora_B.bias" in adapter:
        return tensor + adapter[f"{module}.lora_B.bias"]
    if leaf == "weight" and f"{module}.lora_A.weight" in adapter:
        product = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        return tensor + product
    return tensor


def rounded(encoders: Encoders, bits: int) -> Stored:
    """All matrices rounded to integers, `GROUP` weights in a row with one fp16 scale; to nearest.

    Vectors stay as they are.
    """
    size = 0.0
    for tensors in encoders.tuned.values():
        for tensor in tensors.values():
            if tensor.ndim < 2:
                size += tensor.numel() * tensor.itemsize
            else:
                size += tensor.numel() * (bits + 16 / GROUP) / 8

    def restored(task: str) -> dict[str, Tensor]:
        return {
            name: tensor if tensor.ndim < 2 else round_to(tensor, bits)
            for name, tensor in encoders.tuned[task].items()
        }

    return Stored(round(size), restored)


def round_to(tensor: Tensor, bits: int) -> Tensor:
    """A tensor after rounding to `bits`, symmetrically, by groups along its last side."""
    flat = tensor.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    most = 2 ** (bits - 1) - 1
    scale = (padded.abs().amax(dim=1, keepdim=True) / most).half().to(tensor.dtype)
    scale = torch.where(scale > 0, scale, 1)
    back = (padded / scale).round().clamp(-most - 1, most) * scale
    return back.view(-1)[: len(flat)].view(tensor.shape)


def _masked_bytes(encoders: Encoders) -> int:
    """The pretrained encoder, one vector for all tasks, and a bit a weight and task."""
    one = models_bytes(encoders) // len(encoders.tuned)
    numbers = sum(tensor.numel() for tensor in next(iter(encoders.tuned.values())).values())
    return 2 * one + len(encoders.tuned) * (numbers // 8)


class _AsModule(nn.Module):
    """Tensors as frozen parameters, under the names that they have in a model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def emr(encoders: Encoders) -> Stored:
    """FusionBench's EMR: one elected vector, and a mask and a scale a task."""
    from fusion_bench.method.emr_merging.emr_merging import EMRMerging

    models = {"_pretrained_": pretrained_tensors(encoders), **encoders.tuned}
    merged = EMRMerging().run({name: _AsModule(tensors) for name, tensors in models.items()})

    def restored(task: str) -> dict[str, Tensor]:
        own = deepcopy(merged)
        own.set_task(task)
        return {name: tensor.detach() for name, tensor in own.backbone.state_dict().items()}

    return Stored(_masked_bytes(encoders), restored)


def tall_masks(encoders: Encoders, scales: Mapping[str, float]) -> Stored:
    """FusionBench's TALL masks: the sum of all task vectors, and a mask a task.

    `scales` are the paper's lambda, one a task: the larger, the fewer weights a mask lets through.

    FusionBench 0.2.33's algorithm makes its masks from the pretrained weights and the task vectors,
    where the function that it calls (and the paper, arXiv 2405.07813) wants weights throughout: it
    is called as documented here.
    """
    from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks

    pretrained = pretrained_tensors(encoders)
    total = {
        name: sum(tensors[name] - base for tensors in encoders.tuned.values())
        for name, base in pretrained.items()
    }
    multi = {name: base + total[name] for name, base in pretrained.items()}

    def restored(task: str) -> dict[str, Tensor]:
        masks = generate_task_masks(multi, dict(encoders.tuned[task]), pretrained, scales[task])
        return {name: base + masks[name] * total[name] for name, base in pretrained.items()}

    return Stored(_masked_bytes(encoders), restored)


def pretrained_tensors(encoders: Encoders) -> dict[str, Tensor]:
    """The pretrained encoder's tensors, those that the fine-tuned ones have."""
    tensors = load_file(encoders.pretrained / WEIGHTS)
    return {name: tensors[name] for name in next(iter(encoders.tuned.values()))}


@torch.no_grad()
def peft_differences(served: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """How far PEFT's outputs are from those of the restored encoders, relative to the largest one.

    Args:
        served: a folder of `mergekit-cart compress`.
        tasks: adapters to load, one after the other, on one base.

    Returns:
        The largest differences of all tasks: `switched` by `load_adapter` and `set_adapter`, and
        `merged` by `merge_and_unload`.
    """
    from peft import PeftModel
    from transformers import AutoModel

    def base() -> Any:
        return AutoModel.from_pretrained(served / "base").eval()

    expected = base()
    first, *others = tasks
    model = PeftModel.from_pretrained(base(), served / "adapters" / first, adapter_name=first)
    for task in others:
        model.load_adapter(served / "adapters" / task, adapter_name=task)
    worst = {"switched": 0.0, "merged": 0.0}
    for task in tasks:
        expected.load_state_dict(load_task(served, task))
        inputs = example_inputs(expected)
        wanted = expected(**inputs).last_hidden_state
        model.set_adapter(task)
        adapter = served / "adapters" / task
        merged = PeftModel.from_pretrained(base(), adapter).eval().merge_and_unload()
        for how, one in (("switched", model.eval()), ("merged", merged)):
            difference = (one(**inputs).last_hidden_state - wanted).abs().max()
            worst[how] = max(worst[how], float(difference / wanted.abs().max()))
    return worst


def example_inputs(model: Any) -> dict[str, Tensor]:
    """Random images or tokens, whatever an encoder reads."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(model.config, "vocab_size"):
        shape = (4, 40)
        return {
            "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    return {"pixel_values": torch.randn(4, 3, 56, 56, generator=generator)}
