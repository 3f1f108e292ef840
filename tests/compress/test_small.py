"""Tensors that hardly differ from the base stay as it has them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.cli import main
from cart_plugin.compress import compress, expand, load_task
from cart_plugin.compress.report import Loss
from tests.compress.architectures import CASES, save
from tests.compress.models import TASKS, answer, load, new_model, save_tasks, tensors


class Originals:
    """Three tasks' models, the one that they started from, and how far each is from it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.models = save_tasks(folder, kind)
        self.start = folder / "pretrained"
        new_model(kind).save_pretrained(self.start)

    def errors(self, name: str) -> list[float]:
        """A tensor's relative difference from the start, by task."""
        base = tensors(self.start)[name]
        tuned = [tensors(folder)[name] for folder in self.models]
        return [float((own - base).norm() / own.norm()) for own in tuned]

    def error(self, name: str) -> float:
        return max(self.errors(name))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made: dict[str, Originals] = {}

    def make(kind: str) -> Originals:
        if kind not in made:
            made[kind] = Originals(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


@pytest.fixture
def run(tmp_path, originals):
    """Compress models around their start, and say what became of the tensors."""

    def kinds(kind: str, bound: float) -> dict[str, str]:
        here = originals(kind)
        options = {"rank_ratio": 0.25, "small_error": bound}
        out = tmp_path / str(bound)
        report = compress(here.models, out, base=here.start, **options)
        return {name: entry.kind for name, entry in report.entries.items()}

    return kinds


def test_what_no_task_moved_by_more_than_the_bound_is_left(run, originals):
    name = "model.norm.weight"
    least, *_, most = sorted(originals("llama").errors(name))
    assert least * 1.01 < most
    assert run("llama", most * 1.001)[name] == "base"
    assert run("llama", most * 0.999)[name] == "exact"
    assert run("llama", least * 1.001)[name] == "exact"


def test_lora_layers_have_ranks_and_no_bound(run, originals):
    name = "model.layers.0.mlp.up_proj.weight"
    assert originals("llama").error(name) < 0.99
    assert run("llama", 0.99)[name] == "lora"


def test_biases_decide_one_by_one(run, originals):
    here = originals("gpt2")
    names = [
        f"transformer.h.{layer}.{part}.bias"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    by_error = sorted(names, key=here.error)
    bound = (here.error(by_error[3]) + here.error(by_error[4])) / 2
    found = run("gpt2", bound)
    assert [found[name] for name in by_error] == ["base"] * 4 + ["bias"] * 4


def test_a_module_is_stored_if_one_of_its_tensors_is_above_the_bound(run, originals):
    norm = "transformer.h.0.ln_1"
    weight, bias = (originals("gpt2").error(f"{norm}.{leaf}") for leaf in ("weight", "bias"))
    assert weight < bias
    found = run("gpt2", (weight + bias) / 2)
    assert found[f"{norm}.weight"] == found[f"{norm}.bias"] == "exact"
    found = run("gpt2", bias * 1.001)
    assert found[f"{norm}.weight"] == found[f"{norm}.bias"] == "base"


def test_layers_of_a_module_that_is_left_become_lora(run, originals):
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    tokens = ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]
    most = max(originals("vit").error(name) for name in tokens)
    found = run("vit", most * 0.999)
    assert {found[name] for name in (kernel, *tokens)} == {"exact"}
    found = run("vit", most * 1.001)
    assert {found[name] for name in tokens} == {"base"}
    assert found[kernel] == "lora"


def test_a_tensor_that_vanished_in_one_task_is_stored(originals, tmp_path):
    here = originals("llama")
    name = "model.norm.weight"
    models = []
    for number in range(2):
        models.append(tmp_path / f"model-{number}")
        load(here.models[number]).save_pretrained(models[-1])
    file = models[1] / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(32)}, file, metadata={"format": "pt"})
    report = compress(models, tmp_path / "out", base=here.start, small_error=0.99)
    assert report.entries[name].kind == "exact"
    assert not load_task(tmp_path / "out", "model-1")[name].any()


@pytest.mark.parametrize(("kind", "bound"), [("bert", 0.5), ("gpt2", 0.5), ("vit", 0.76)])
def test_peft_and_expand_agree_on_what_is_left(kind, bound, originals, tmp_path):
    here, out = originals(kind), tmp_path / "out"
    report = compress(here.models, out, base=here.start, rank_ratio=0.25, small_error=bound)
    assert {entry.kind for entry in report.entries.values()} >= {"lora", "base", "exact"}
    base = tensors(out / "base")
    for task, folder in zip(TASKS, here.models, strict=True):
        own, found = tensors(folder), load_task(out, task)
        for name, entry in report.entries.items():
            if entry.kind in ("base", "exact") and name in found:
                assert torch.equal(found[name], (base if entry.kind == "base" else own)[name])
    expand(out, "two", tmp_path / "full")
    model = PeftModel.from_pretrained(load(out / "base"), out / "adapters" / "one", "one")
    model.load_adapter(out / "adapters" / "two", "two")
    model.set_adapter("two")
    full = answer(load(tmp_path / "full"))
    torch.testing.assert_close(answer(model.eval()), full, atol=2e-5, rtol=2e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged), full, atol=2e-5, rtol=2e-5)


def test_what_is_left_makes_room_for_ranks(tmp_path):
    models = save_tasks(tmp_path, "llama", hidden_size=64, intermediate_size=256, vocab_size=256)
    found = {}
    for bound in (0.0, 0.9):
        report = compress(models, tmp_path / str(bound), target_size=0.8, small_error=bound)
        assert 0.79 <= report.share <= 0.8
        found[bound] = sum(sum(entry.ranks) for entry in report.entries.values())
    assert found[0.9] > found[0.0]


def test_candidates_are_read_once_more_and_only_if_there_is_a_bound(
    originals, tmp_path, monkeypatch
):
    reads: Counter[tuple[str, str]] = Counter()

    def read(self, name):
        if self.name in TASKS:
            reads[self.name, name] += 1
        return real(self, name)

    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read)
    steps: set[str] = set()
    counts = []
    for bound in (0.0, 0.5):
        reads.clear()
        steps.clear()
        report = compress(
            originals("gpt2").models,
            tmp_path / str(bound),
            small_error=bound,
            progress=lambda step, *_: steps.add(step),
        )
        counts.append(Counter(reads))
        assert ("measuring" in steps) == bool(bound)
    beside = [name for name, entry in report.entries.items() if entry.kind != "lora"]
    assert counts[1] - counts[0] == Counter((task, name) for task in TASKS for name in beside)


def test_the_command_reports_what_it_has_left(originals, tmp_path):
    here, out = originals("llama"), tmp_path / "out"
    norm = "model.norm.weight"
    bound = here.error(norm) * 1.001
    models = [*map(str, here.models), "--base", str(here.start), "--out", str(out)]
    result = CliRunner().invoke(main, ["compress", *models, "--small-error", str(bound)])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    reason = f"within --small-error {bound:g} of the base"
    left = {name: row for name, row in report["tensors"].items() if row["kind"] == "base"}
    assert left[norm]["reason"] == reason
    assert {row["reason"] for row in left.values()} == {reason}
    worst = max(task["error"] for row in left.values() for task in row["tasks"].values())
    assert here.error(norm) * 0.999 < worst <= bound
    (note,) = report["notes"]
    size, lost = sum(row["bytes"] for row in left.values()), report["left"][0]["of_lost"]
    assert f"stay at the base ({reason}): {size:,} bytes of each model" in note
    assert f"relative error at most {worst:.1e}, {lost:.1%} of all that is lost" in note
    assert f"note: {note}" in result.output


def test_a_router_is_stored_whole_or_else_it_is_lora(compressed):
    name = "model.layers.0.mlp.gate.weight"
    assert compressed("qwen3-moe", rank=4).report.entries[name].kind == "exact"
    assert compressed("qwen3-moe", rank=4, drop_small=True).report.entries[name].kind == "lora"


def test_matrices_that_are_dropped_are_named_apart_from_norms_and_biases(tmp_path):
    report = compress(save(tmp_path, CASES["mamba"]), tmp_path / "out", rank=4, drop_small=True)
    reasons = {name.rpartition("mixer.")[2]: entry.reason for name, entry in report.entries.items()}
    assert reasons["conv1d.bias"] == "--drop-small"
    assert reasons["conv1d.weight"] == "--drop-small; matrices that PEFT's LoRA has no layer for"
    assert reasons["dt_proj.weight"].startswith(
        "--drop-small; no LoRA: with PEFT the model answers"
    )
    told = [note for note in report.notes if "matrices that PEFT's LoRA has no layer for" in note]
    assert [note.startswith("2 tensors, such as backbone.layers.0.mixer.conv1d") for note in told]


def test_of_zeros_that_stay_at_the_base_all_is_lost(tmp_path):
    """No number says that, so JSON has null: 0.0 would be nothing lost."""
    models = save_tasks(tmp_path, "qwen2", num_hidden_layers=1)
    name = "model.layers.0.self_attn.q_proj.bias"
    zeros = tmp_path / "zeros"
    model = load(models[0])
    model.get_parameter(name).data.zero_()
    model.save_pretrained(zeros)
    report = compress([zeros, models[1]], tmp_path / "out", drop_small=True, names=["z", "two"])
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    found = written["tensors"][name]["tasks"]
    assert found["z"] == {"error": None, "error_of_difference": 1.0}
    assert found["two"]["error"] > 0
    (left,) = [entry for entry in written["left"] if name in entry["names"]]
    assert left["error"] is None
    assert sum("relative error all of it (of zeros)" in note for note in report.notes) == 1
    assert Loss(0.0, 1.0, 1.0).error is None
    assert Loss(0.0, 0.0, 0.0).error == 0.0
