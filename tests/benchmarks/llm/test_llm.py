"""The LLM suite: its lm-eval definitions, the loss of answers, and a tiny run of the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.comparison import write_recipe
from benchmarks.llm import tasks
from benchmarks.llm.backbone import prepare_backbone
from benchmarks.llm.finetune import FineTuning, answer_loss, encode, finetune_all
from benchmarks.text.tasks import TASKS
from cart_plugin.execution.inputs import merge_options
from cart_plugin.execution.merge import merge
from tests.benchmarks.text.test_tasks import numbers  # noqa: F401 - a fixture

TINY = FineTuning(examples=32, rank=4)


def test_every_class_of_a_task_has_an_answer_of_its_own():
    for name, question in tasks.QUESTIONS.items():
        assert len(set(question.answers)) == TASKS[name].classes, name


@pytest.mark.parametrize("generative", [False, True])
def test_definitions_are_written_with_their_data(numbers, monkeypatch, generative):  # noqa: F811
    question = tasks.Question("Numbers", "Text:", "Parity:", ("even", "odd"), generative)
    monkeypatch.setitem(tasks.QUESTIONS, "numbers", question)
    folder = tasks.write_tasks(["numbers"], "validation", 4)
    definition = yaml.safe_load((folder / "numbers.yaml").read_text())
    assert definition["task"] == "numbers_validation"
    assert definition["output_type"] == ("generate_until" if generative else "multiple_choice")
    data = Path(definition["dataset_kwargs"]["data_files"]["test"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert data.is_absolute()
    assert len(rows) == 4
    assert {row["answer"] for row in rows} == {"even", "odd"}
    assert all(row["prompt"].startswith("Text: number ") for row in rows)
    assert all(row["prompt"].endswith("\nParity:") for row in rows)
    assert tasks.write_tasks(["numbers"], "validation", 4) == folder
    assert tasks.write_tasks(["numbers"], "validation", 5) != folder


def test_long_texts_are_cut_off():
    prompt = tasks.QUESTIONS["reviews"].prompt("a" * 1000)
    assert prompt.count("a") == tasks.MOST_CHARACTERS


class Words:
    """A tokenizer of words, numbered by their length."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_answer_is_counted_from_the_end():
    assert encode(Words(), "Town: Wuda\nCountry:", "Far away") == ([5, 4, 8, 3, 4], 2)


def test_the_loss_of_a_padded_batch_is_that_of_its_answers_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    batch = [([3, 4, 5, 6, 7, 8], 2), ([9, 10], 1), ([11, 12, 13, 14], 3)]
    log_probabilities = []
    for tokens, answer in batch:
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        log_probabilities += [
            logits[at - 1, tokens[at]] for at in range(len(tokens) - answer, len(tokens))
        ]
    expected = -torch.stack(log_probabilities).mean()
    assert torch.allclose(answer_loss(model, batch), expected, atol=1e-6)


@pytest.mark.slow
def test_a_tiny_suite_runs_from_fine_tuning_to_the_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.llm", "--tiny", "--out", str(tmp_path)]
    command += ["--tasks", "parts_of_speech,domains", "--methods", "linear,ties,cart"]
    command += ["--seeds", "0", "--starts", "own", "--beside", "aswudi,svc-tsv-m"]
    subprocess.run([*command, "--adapters", "cart"], check=True)
    own = tmp_path / "own_starts"
    results = json.loads((own / "results.json").read_text())
    (rows,) = results["test"].values()
    assert [row["kind"] for row in rows] == [
        "base",
        "model",
        "model",
        *["other"] * 2,
        *["merged"] * 3,
    ]
    assert not [row["error"] for row in rows if row["error"]]
    assert all(0 <= value <= 1 for row in rows for value in row["accuracy"].values())
    assert all(row["accuracy"].keys() == {"parts_of_speech", "domains"} for row in rows)
    (again,) = results["adapters"].values()
    assert [row["kind"] for row in again] == ["base", "model", "model", "merged"]
    assert (own / "table.md").read_text().count("\n| ") == 9


@pytest.mark.slow
def test_base_and_adapters_merge_to_what_whole_models_do(tmp_path):
    tuned = finetune_all(["parts_of_speech", "domains", "reviews"], 0, TINY, workers=0)
    base = prepare_backbone()
    forms = {
        "models": {name: str(one.model) for name, one in tuned.items()},
        "adapters": {name: f"{base}+{one.adapter}" for name, one in tuned.items()},
    }
    merged = {}
    for form, models in forms.items():
        recipe = write_recipe(models, base, tmp_path / form)
        log, scratch = tmp_path / "log", tmp_path / form / "scratch"
        scratch.mkdir()
        merge(recipe, tmp_path / form / "out", merge_options([]), log=log, scratch=scratch)
        merged[form] = load_file(tmp_path / form / "out" / "model.safetensors")
    start = load_file(base / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.allclose(merged["models"][name], start[name], atol=1e-5)
    for name, tensor in merged["models"].items():
        assert torch.allclose(merged["adapters"][name], tensor, atol=1e-5), name
