"""The LLM suite's adapters, and a quick judge of models that have them merged.

`benchmarks.llm` judges by lm-eval, which loads each model anew. Here dozens of merges of one model
in memory are judged: what is generated greedily is right if every token of the answer is the most
likely one after the tokens before it, so that one forward pass says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters.loaded import Loaded
from benchmarks.llm.backbone import prepare_backbone
from benchmarks.llm.finetune import FineTuning, encode, finetune_all, packed_logits
from benchmarks.llm.tasks import QUESTIONS, examples
from benchmarks.text.tasks import load_split

TOGETHER = 16  # examples that go through the model at once

Encoded = tuple[list[int], int]


def load(seed: int, split: str, count: int, *, one_start: bool) -> Loaded:
    """The adapters of a seed, trained now if that has not been done.

    Args:
        seed: of the training.
        split: to judge on.
        count: examples a task to judge on; the first ones, which are nearly balanced by class.
        one_start: see `FineTuning.one_start`.
    """
    from transformers import AutoModelForCausalLM

    tuned = finetune_all(list(QUESTIONS), seed, FineTuning(one_start=one_start))
    model = AutoModelForCausalLM.from_pretrained(prepare_backbone(), dtype=torch.float32)
    data = {name: _encoded(name, split, count) for name in QUESTIONS}

    def judge(model: torch.nn.Module, names: Sequence[str]) -> dict[str, float]:
        return {name: accuracy(model, data[name], choices(name)) for name in names}

    return Loaded(model, {name: one.adapter for name, one in tuned.items()}, judge)


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepare_backbone())


def _encoded(name: str, split: str, count: int) -> list[Encoded]:
    data = load_split(name, split).head(count)
    return [encode(_tokenizer(), prompt, answer) for prompt, answer in examples(name, data)]


def choices(name: str) -> list[int]:
    """The first tokens of a question's answers, if it is one of choosing; else none.

    The answers of such questions are one token each, so that the first one decides.
    """
    question = QUESTIONS[name]
    if question.generative:
        return []
    tokens = [encode(_tokenizer(), "", answer)[0] for answer in question.answers]
    if {len(one) for one in tokens} != {2}:  # itself, and the line's end
        raise ValueError(f"an answer of {name} is more than one token")
    return [one[0] for one in tokens]


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Sequence[Encoded], among: Sequence[int]) -> float:
    """Share of examples whose answer a model gives, between 0 and 1.

    Args:
        model: of language.
        data: as `encode` gives it.
        among: tokens of which the likeliest is the answer; if none, all tokens have to be right.
    """
    right = 0
    for start in range(0, len(data), TOGETHER):
        batch = data[start : start + TOGETHER]
        logits, tokens = packed_logits(model, batch)
        parts = zip(_split(logits, batch), _split(tokens, batch), strict=True)
        for found, answer in parts:
            if among:
                likeliest = among[int(found[0, list(among)].argmax())]
                right += likeliest == int(answer[0])
            else:
                right += bool((found.argmax(dim=1) == answer).all())
    return right / len(data)


def _split(values: Tensor, batch: Sequence[Encoded]) -> tuple[Tensor, ...]:
    return values.split([answer for _, answer in batch])
