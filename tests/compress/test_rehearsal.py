"""What PEFT bypasses, crashes on or has no place for is found before an adapter is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from cart_plugin.compress import compress, expand, miniature, trial
from tests.compress.architectures import CASES, Case, save
from tests.compress.models import save_tasks
from tests.compress.refused import refusal

FAST = ("whisper", "siglip", "mamba", "laguna", "afmoe", "qwen3-vl-moe", "granite-speech")


def _kinds(report: Any, ends: tuple[str, ...]) -> set[str]:
    entries = {name: e.kind for name, e in report.entries.items() if name.endswith(ends)}
    assert len(entries) >= len(ends)
    return set(entries.values())


@pytest.mark.parametrize("drop_small", [False, True], ids=["", "drop-small"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_peft_answers_as_the_expanded_model(name, drop_small, tmp_path):
    case = CASES[name]
    report = compress(save(tmp_path, case), tmp_path / "out", rank=4, drop_small=drop_small)
    expand(tmp_path / "out", "two", tmp_path / "full")
    base = case.load(tmp_path / "out" / "base")
    around, full = case.answer(base), case.answer(case.load(tmp_path / "full"))
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "two").eval()
    effect = float((full - around).norm())
    assert effect > 1e-3 * float(around.norm())
    assert float((case.answer(adapted) - full).norm()) < 1e-4 * effect
    if case.whole:
        assert _kinds(report, case.whole) == {"averaged" if drop_small else "exact"}
    # A router is small, and exact where that is allowed.
    lora = tuple(end for end in case.lora if drop_small or "router" not in end or name == "llama4")
    assert _kinds(report, lora) == {"lora"}


@pytest.mark.parametrize(
    ("name", "drop_small", "told"),
    [
        (
            "siglip",
            True,
            "1 modules such as head.attention.out_proj get no LoRA but stay at the base",
        ),
        (
            "mamba",
            False,
            "2 modules such as backbone.layers.0.mixer.dt_proj get no LoRA but are stored",
        ),
    ],
)
def test_a_bypassed_layer_is_named_with_what_became_of_it(name, drop_small, told, tmp_path):
    models = save(tmp_path, CASES[name])
    notes = compress(models, tmp_path / "out", rank=4, drop_small=drop_small).notes
    assert any(note.startswith(told) for note in notes)


@pytest.mark.slow
def test_a_model_whose_matrices_all_crash_is_refused(tmp_path):
    settings = {"image_size": 32, "depth_multiplier": 0.25, "num_labels": 3}
    models = save(tmp_path, Case("MobileNetV2ForImageClassification", settings, "images"))
    message = refusal(models, tmp_path, rank=4)
    assert "PEFT's LoRA works for none of the matrices" in message
    assert "has no attribute 'stride'" in message


def test_a_model_that_cannot_be_run_is_judged_by_its_classes_and_says_so(tmp_path, monkeypatch):
    # As where nobody knows what a model is fed.
    monkeypatch.setattr(miniature, "candidates", lambda _: iter(()))
    models = save(tmp_path, CASES["siglip"])
    report = compress(models, tmp_path / "out", rank=4)
    assert report.entries["head.attention.out_proj.weight"].kind == "exact"
    assert any("no way was found to run a small model" in note for note in report.notes)


def test_layers_outside_the_answer_are_named(tmp_path):
    settings = {
        "text_config": {**CASES["llama4"].settings, "model_type": "llama"},
        "vision_config": {**CASES["siglip"].settings, "model_type": "clip_vision_model"},
        "image_token_index": 63,
    }
    config = transformers.LlavaConfig(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for task in ("one", "two"):
            model = transformers.LlavaForConditionalGeneration(config)
            model.save_pretrained(tmp_path / task)
    notes = compress([tmp_path / "one", tmp_path / "two"], tmp_path / "out", rank=4).notes
    told = [note for note in notes if "had no part in the trial run's answers" in note]
    assert ["multi_modal_projector.linear_1" in note for note in told] == [True]


def test_adapters_that_work_alone_and_not_together_are_refused(tmp_path, monkeypatch):
    models = save_tasks(tmp_path, "llama", num_hidden_layers=1)
    honest = trial.Trial._difference

    def dishonest(self, model, values):
        effect, error = honest(self, model, values)
        changed = sum(bool(v.any()) for name, v in values.items() if "lora_B" in name)
        return effect, (1.0 if changed > 1 else error)

    monkeypatch.setattr(trial.Trial, "_difference", dishonest)
    assert "PEFT answers otherwise with these adapters" in refusal(models, tmp_path, rank=4)
