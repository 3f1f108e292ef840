"""The tasks of the LLM suite: prompts of the text suite's data, and their lm-eval definitions.

    folder = write_tasks(["reviews", "countries"], "test", 400)
    # lm-eval run --tasks reviews_test,countries_test --include_path FOLDER ...

Short questions with short answers: two with the choices compared by likelihood, two whose answers
are generated and must match to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.text.dictionaries import DOMAINS
from benchmarks.text.places import COUNTRIES
from benchmarks.text.splits import Split
from benchmarks.text.tasks import load_split, prepare_task, training_sample


@dataclass(frozen=True)
class Question:
    """How a classification task is put to a language model.

    Args:
        title: its name in tables.
        before: what stands before the text.
        after: what stands between the text and the answer.
        answers: by class.
        generative: the answer is generated, not chosen among the answers by likelihood.
    """

    title: str
    before: str
    after: str
    answers: tuple[str, ...]
    generative: bool

    def prompt(self, text: str) -> str:
        """The prompt, without the space that an answer starts with."""
        return f"{self.before} {text[:MOST_CHARACTERS]}\n{self.after}"


MOST_CHARACTERS = 240  # of a text; the rest is cut off
TASK_FORMAT = 1  # raise it when the definitions change, so that they are written anew

_COUNTRY_NAMES = {
    "BR": "Brazil",
    "CN": "China",
    "DE": "Germany",
    "ES": "Spain",
    "FR": "France",
    "GB": "Britain",
    "ID": "Indonesia",
    "IN": "India",
    "IR": "Iran",
    "IT": "Italy",
    "JP": "Japan",
    "NG": "Nigeria",
    "NL": "Netherlands",
    "PH": "Philippines",
    "PL": "Poland",
    "RO": "Romania",
    "RU": "Russia",
    "TH": "Thailand",
    "TR": "Turkey",
    "VN": "Vietnam",
}

QUESTIONS: dict[str, Question] = {
    "reviews": Question(
        "Film reviews", "Film review:", "Opinion:", ("negative", "positive"), generative=False
    ),
    "parts_of_speech": Question(
        "Parts of speech",
        "Definition:",
        "Part of speech:",
        ("noun", "verb", "adjective", "adverb"),
        generative=False,
    ),
    "domains": Question(
        "WordNet domains", "Definition:", "Domain:", tuple(DOMAINS.values()), generative=True
    ),
    "countries": Question(
        "Countries of towns",
        "Town:",
        "Country:",
        tuple(_COUNTRY_NAMES[code] for code in COUNTRIES),
        generative=True,
    ),
}


def examples(name: str, data: Split) -> list[tuple[str, str]]:
    """Prompts and answers of a split."""
    question = QUESTIONS[name]
    return [
        (question.prompt(text), question.answers[label])
        for text, label in zip(data.texts, data.labels.tolist(), strict=True)
    ]


def training_examples(name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` prompts and answers (or all, if fewer), balanced by class, another draw a seed."""
    prepare_task(name)
    return examples(name, training_sample(name, count, seed))


def write_tasks(names: Sequence[str], split: str, count: int) -> Path:
    """Write lm-eval's definitions and data of a split; return the folder for `--include_path`.

    The tasks are called `<name>_<split>`. Data files are named by their whole paths, as lm-eval
    looks for relative ones in the current folder.

    Args:
        names: the tasks.
        split: `validation` or `test`.
        count: examples a task; the first ones, which are nearly balanced by class.
    """
    identity = {
        "questions": {name: asdict(QUESTIONS[name]) for name in names},
        "data": {name: prepare_task(name).name for name in names},
        "split": split,
        "count": count,
        "characters": MOST_CHARACTERS,
        "format": TASK_FORMAT,
    }
    folder = cache_root() / "llm" / f"tasks-{split}-{settings_hash(identity)}"
    if read_manifest(folder) is not None:
        return folder
    with new_folder(folder) as target:
        for name in names:
            rows = [
                {"prompt": prompt, "answer": answer}
                for prompt, answer in examples(name, load_split(name, split).head(count))
            ]
            data = f"{name}.jsonl"
            (target / data).write_text("".join(json.dumps(row) + "\n" for row in rows))
            definition = _definition(name, split, folder / data)
            (target / f"{name}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
        write_json(target / MANIFEST, identity)
    return folder


def task_name(name: str, split: str) -> str:
    """lm-eval's name of a task."""
    return f"{name}_{split}"


def _definition(name: str, split: str, data: Path) -> dict[str, Any]:
    question = QUESTIONS[name]
    common = {
        "task": task_name(name, split),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "metadata": {"version": TASK_FORMAT},
    }
    if not question.generative:
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_choice": list(question.answers),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [
            {
                "name": "strip",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
            }
        ],
    }
