"""One SmolLM2 a task, fine-tuned from the same start by LoRA.

tuned = finetune_task("domains", seed=0)  # trained once, then found again
tuned.adapter, tuned.model  # PEFT's adapter, and the model with the adapter merged in
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.training import FineTuner, Settings, Shown, Trained, train_model
from benchmarks.llm.backbone import SOURCE, prepare_backbone
from benchmarks.llm.tasks import MOST_CHARACTERS, QUESTIONS, training_examples
from benchmarks.text.tasks import prepare_task

# Of the attention and the MLP: all matrices of a layer.
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FineTuning(Settings):
    """Settings of fine-tuning; the loss counts the answers only.

    Args:
        examples: training examples of the task.
        rank: of the adapter's matrices; its scale is 2.
        one_start: all tasks' adapters of a seed start from the same A, as of trainings with one
            seed; otherwise each from its own.
    """

    epochs: int = 1
    batch: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    examples: int = 2000
    rank: int = 16
    one_start: bool = True


@dataclass(frozen=True)
class Tuned:
    """The two forms of one fine-tuned model: folders of the adapter and of the whole model."""

    adapter: Path
    model: Path

    @classmethod
    def of(cls, folder: Path) -> Tuned:
        """Those in a folder of the cache."""
        return cls(folder / "adapter", folder / "model")


def _identity(name: str, seed: int, settings: FineTuning) -> dict[str, object]:
    return asdict(settings) | {
        "task": name,
        "question": asdict(QUESTIONS[name]),
        "characters": MOST_CHARACTERS,
        "data": prepare_task(name).name,
        "pretrained": f"{SOURCE.name}-{SOURCE.version}",
        "seed": seed,
    }


def _train(name: str, seed: int, settings: FineTuning, shown: Shown) -> Trained:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = prepare_backbone()
    tokenizer = AutoTokenizer.from_pretrained(base)
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    own = 0 if settings.one_start else 1 + list(QUESTIONS).index(name)
    torch.manual_seed(seed + 1000 * own)  # for the adapter's start
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(MATRICES),
    )
    model = get_peft_model(frozen, lora)
    data = [
        encode(tokenizer, prompt, answer)
        for prompt, answer in training_examples(name, settings.examples, seed)
    ]

    def loss(chosen: Tensor) -> Tensor:
        return answer_loss(model, [data[position] for position in chosen.tolist()])

    def save(target: Path) -> None:
        model.save_pretrained(str(target / "adapter"))
        merged: Any = model.merge_and_unload()
        merged.save_pretrained(target / "model")
        tokenizer.save_pretrained(target / "model")

    title = QUESTIONS[name].title
    return train_model(model, loss, len(data), settings, seed, title=title, shown=shown), save


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Tokens of an example, and how many of them, at the end, are the answer and the line's end.

    Prompt and answer are made into tokens apart; the answer's space keeps them so in lm-eval, too.
    """
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = tokenizer(f" {answer}\n", add_special_tokens=False)["input_ids"]
    return asked + said, len(said)


def answer_loss(model: torch.nn.Module, batch: Sequence[tuple[list[int], int]]) -> Tensor:
    """Mean cross entropy of the answers' tokens (a scalar) of a batch of `encode`d examples."""
    return torch.nn.functional.cross_entropy(*packed_logits(model, batch))


def packed_logits(
    model: torch.nn.Module, batch: Sequence[tuple[list[int], int]]
) -> tuple[Tensor, Tensor]:
    """What a model says of the answers' tokens, and these.

    The examples go through the model as one packed row, their positions counted anew, by which
    transformers keeps their attention apart: padded to the longest of a batch, four tenths of the
    tokens would be padding. Logits are computed where answers stand only: with a vocabulary of
    49152 those of whole prompts would cost a quarter of the step.

    Args:
        model: of language.
        batch: `encode`d examples.

    Returns:
        Logits in fp32, ``(answers' tokens of the batch, vocabulary)``, and the tokens.
    """
    tokens = torch.tensor([token for example, _ in batch for token in example])
    positions = torch.cat([torch.arange(len(example)) for example, _ in batch])
    ends = torch.tensor([len(example) for example, _ in batch]).cumsum(0).tolist()
    said = torch.cat(
        [torch.arange(end - answer, end) for end, (_, answer) in zip(ends, batch, strict=True)]
    )
    logits = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=said - 1,
    ).logits
    return logits[0].float(), tokens[said]


TUNER = FineTuner(
    place="llm", settings=FineTuning, examples="examples", identity=_identity, train=_train
)


def finetune_task(name: str, seed: int, settings: FineTuning | None = None) -> Tuned:
    """Fine-tune the pretrained model on a task unless that is done.

    The seed decides the adapter's start, too; see `FineTuning.one_start`.
    """
    return Tuned.of(TUNER.finetune(name, seed, settings))


def finetune_all(
    names: Sequence[str], seed: int, settings: FineTuning | None = None, workers: int = 2
) -> dict[str, Tuned]:
    """Fine-tune several tasks, `workers` at a time (0: in this process); return their folders."""
    folders = TUNER.finetune_all(names, seed, settings, workers)
    return {name: Tuned.of(folder) for name, folder in folders.items()}
