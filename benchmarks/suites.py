"""The suites' encoders as tensors in memory, merged by the plugin's own functions and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

GENTLE = 3e-5  # learning rate of the weaker fine-tuning; the suites' own is 1e-4


@dataclass(frozen=True)
class Encoders:
    """Fine-tuned encoders of one suite and seed.

    Attributes:
        tuned: their tensors, by task.
        judge: takes tensors and the names of tasks; returns their accuracies, 0 to 1.
        folders: where they lie, by task.
        pretrained: the folder of what they were fine-tuned from.
    """

    tuned: Mapping[str, Mapping[str, Tensor]]
    judge: Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, float]]
    folders: Mapping[str, Path] = field(default_factory=dict)
    pretrained: Path = Path()

    def base(self) -> dict[str, Tensor]:
        """What they were fine-tuned from: those of its tensors that they have, too."""
        held = load_file(self.pretrained / "model.safetensors")
        return {name: held[name] for name in next(iter(self.tuned.values()))}

    def average(self) -> dict[str, Tensor]:
        """The mean of the encoders, in fp32."""
        first, *others = self.tuned.values()
        mean = {name: tensor.float().clone() for name, tensor in first.items()}
        for tensors in others:
            for name, tensor in tensors.items():
                mean[name] += tensor
        return {name: tensor / len(self.tuned) for name, tensor in mean.items()}

    def factors(self, average: Mapping[str, Tensor]) -> dict[str, list[LowRank]]:
        """All singular directions of the centred task vectors, by tensor that CART decomposes."""
        return {
            name: [
                truncated_svd(
                    (tensors[name] - centre).reshape(matrix_shape(name, centre.shape)[1:]),
                    RankRule(1.0),
                    svd="exact",
                )
                for tensors in self.tuned.values()
            ]
            for name, centre in average.items()
            if is_decomposed(name, centre.shape)
        }


def load_encoders(
    suite: str, seed: int, split: str, most: int, tasks: Sequence[str], gentle: bool = False
) -> Encoders:
    """Encoders of a suite, fine-tuned now if that has not been done.

    Args:
        suite: `vision` or `text`.
        seed: of the fine-tuning.
        split: to judge on.
        most: examples a task to judge on.
        tasks: of the suite.
        gentle: fine-tuned with the learning rate `GENTLE`.
    """
    return {"vision": _vision, "text": _text}[suite](seed, split, most, tasks, gentle)


def task_order(suite: str) -> tuple[str, ...]:
    """A suite's tasks; fewer are the first ones of these."""
    from benchmarks.text import tasks as texts
    from benchmarks.vision import tasks as images

    return {"vision": images.SUITE, "text": texts.SUITE}[suite]


def _vision(seed: int, split: str, most: int, tasks: Sequence[str], gentle: bool) -> Encoders:
    from benchmarks.vision.backbone import prepare_backbone
    from benchmarks.vision.evaluate import accuracy, load_encoder
    from benchmarks.vision.finetune import finetune_all, load_head
    from benchmarks.vision.strength import strength
    from benchmarks.vision.tasks import load_split

    settings = {
        name: replace(strength(name), learning_rate=GENTLE) if gentle else strength(name)
        for name in tasks
    }
    folders = finetune_all(tasks, seed, settings)
    heads = {name: load_head(name, seed, own) for name, own in settings.items()}
    data = {name: load_split(name, split).head(most) for name in tasks}
    backbone = prepare_backbone()
    model = load_encoder(backbone)

    def judge(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        model.load_state_dict(dict(tensors))
        return {name: accuracy(model, heads[name], data[name]) for name in names}

    return Encoders(_tensors(folders), judge, folders, backbone)


def _text(seed: int, split: str, most: int, tasks: Sequence[str], gentle: bool) -> Encoders:
    from benchmarks.text.backbone import prepare_backbone
    from benchmarks.text.encoder import all_features, load_encoder, load_tokenizer
    from benchmarks.text.finetune import FineTuning, finetune_all, task_head
    from benchmarks.text.tasks import load_split

    settings = replace(FineTuning(), learning_rate=GENTLE) if gentle else FineTuning()
    folders = finetune_all(tasks, seed, settings)
    heads = {name: task_head(name, settings) for name in tasks}
    data = {name: load_split(name, split).head(most) for name in tasks}
    backbone = prepare_backbone()
    model, tokenizer = load_encoder(backbone), load_tokenizer(backbone)

    def judge(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        model.load_state_dict(dict(tensors))
        found = {}
        for name in names:
            logits = heads[name](all_features(model, tokenizer, data[name].texts))
            right = logits.argmax(dim=1) == torch.from_numpy(data[name].labels)
            found[name] = right.double().mean().item()
        return found

    return Encoders(_tensors(folders), judge, folders, backbone)


def _tensors(folders: Mapping[str, Path]) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
