"""The commands, their report, and what lies on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from cart_plugin import CartError
from cart_plugin.checkpoints import writing
from cart_plugin.checkpoints.side_files import side_files
from cart_plugin.cli import main
from cart_plugin.compress.inputs import open_model
from tests.compress.models import TASKS, answer, load, save_tasks, tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(folder) for folder in save_tasks(tmp_path_factory.mktemp("models"), "llama")]


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_compress_and_expand(models, tmp_path):
    out = tmp_path / "out"
    result = invoke("compress", *models, "--out", out, "--rank-ratio", 0.25, "--names", "a,b, c")
    assert result.exit_code == 0, result.output
    assert "together" in result.output
    assert "worst tensors" in result.output
    assert "of 3 models in" in result.output
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["a", "b", "c"]
    result = invoke("expand", out, "b", tmp_path / "full")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "full").config.architectures == ["LlamaForCausalLM"]


def test_bytes_are_those_of_the_files(models, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", *models, "--out", out).exit_code == 0
    report = json.loads((out / "report.json").read_text())
    base = sum(file.stat().st_size for file in (out / "base").glob("*.safetensors"))
    assert report["base_bytes"] == base
    for task in TASKS:
        files = list((out / "adapters" / task).iterdir())
        assert {file.name for file in files} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert report["tasks"][task]["bytes"] == sum(file.stat().st_size for file in files)
    everything = base + sum(report["tasks"][task]["bytes"] for task in TASKS)
    assert report["bytes"] == everything
    whole = sum(open_model(path, "").bytes for path in _paths(models))
    assert report["share"] == everything / whole


def test_errors_are_those_of_the_expanded_models(models, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", *models, "--out", out).exit_code == 0
    report = json.loads((out / "report.json").read_text())
    assert invoke("expand", out, "two", tmp_path / "two").exit_code == 0
    there, here = tensors(_paths(models)[1]), tensors(tmp_path / "two")
    base = tensors(out / "base")
    for name, entry in report["tensors"].items():
        lost = (there[name] - here[name]).norm()
        found = entry["tasks"]["two"]
        assert found["error"] == pytest.approx(float(lost / there[name].norm()), abs=1e-6)
        difference = (there[name] - base[name]).norm()
        assert found["error_of_difference"] == pytest.approx(float(lost / difference), abs=1e-5)
    assert report["worst"][0]["error_of_difference"] == max(
        task["error_of_difference"]
        for entry in report["tensors"].values()
        for task in entry["tasks"].values()
    )


def test_a_target_size_in_per_cent(models, tmp_path):
    result = invoke("compress", *models, "--out", tmp_path / "out", "--target-size", "80%")
    assert result.exit_code == 0, result.output
    assert 0.79 <= json.loads((tmp_path / "out" / "report.json").read_text())["share"] <= 0.8


def test_a_dtype_for_all(models, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", *models, "--out", out, "--dtype", "bfloat16").exit_code == 0
    assert {tensor.dtype for tensor in tensors(out / "base").values()} == {torch.bfloat16}
    assert load(out / "base").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 4, "--energy", 0.5], "are two rules at once"),
        (["--target-size", "1%"], "target_size=0.01 allows"),
        (["--drop-small", "--small-error", 0.1], "drop_small leaves out more than small_error=0.1"),
        (["--small-error", 1], "small_error must be at least 0 and below 1, got 1.0"),
        (["--names", "a,b"], "3 models but 2 names"),
        (["--names", ""], "'' cannot name an adapter's folder"),
        (["--names", "a,b,c.1"], "'c.1' cannot name an adapter: PEFT takes no dots; use 'c_1'"),
    ],
)
def test_errors_are_one_line(models, tmp_path, arguments, message):
    result = invoke("compress", *models, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_share_that_is_none(models, tmp_path):
    result = invoke("compress", *models, "--out", tmp_path / "out", "--target-size", "small")
    assert result.exit_code == 2
    assert "no share such as 20%" in result.output


@pytest.mark.parametrize("option", ["--target-size", "--small-error"])
def test_a_share_above_one_lacks_its_per_cent(models, tmp_path, option):
    result = invoke("compress", *models, "--out", tmp_path / "out", option, 20)
    assert result.exit_code == 2
    assert "20 is more than the whole; write 20% for per cent" in " ".join(result.output.split())


def test_options_reach_the_function(models, tmp_path, monkeypatch):
    given = {}

    def run(*arguments, **options):
        given.update(options)
        raise CartError("enough")

    monkeypatch.setattr("cart_plugin.compress.compress", run)
    arguments = ["--small-error", "1%", "--seed", 7, "--svd", "fast"]
    assert invoke("compress", *models, "--out", tmp_path / "out", *arguments).exit_code == 1
    assert given["small_error"] == pytest.approx(0.01)
    assert (given["seed"], given["svd"], given["names"]) == (7, "fast", None)


@pytest.mark.parametrize(("ratio", "noted"), [(1, True), (0.05, False)])
def test_a_result_that_saves_nothing_is_noted(models, tmp_path, ratio, noted):
    result = invoke("compress", *models, "--out", tmp_path / "out", "--rank-ratio", ratio)
    share = json.loads((tmp_path / "out" / "report.json").read_text())["share"]
    assert (share >= 1) == noted
    assert ("of the models' bytes, saving none" in result.output) == noted


def test_an_unknown_task(models, tmp_path):
    result = invoke("expand", tmp_path, "one", tmp_path / "full")
    assert result.exit_code == 1
    assert "is no folder that" in result.output


def test_large_models_come_in_shards(models, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 50_000)
    out = tmp_path / "out"
    assert invoke("compress", *models, "--out", out, "--rank-ratio", 1).exit_code == 0
    assert invoke("expand", out, "one", tmp_path / "one").exit_code == 0
    for folder in (out / "base", tmp_path / "one"):
        assert len(list(folder.glob("model-0000*-of-*.safetensors"))) > 1
        load(folder)
    first = tensors(_paths(models)[0])
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensor, first[name], atol=1e-5, rtol=1e-4)


def test_every_task_gets_its_own_tokenizer_template_and_generation_config_back(tmp_path):
    folders = save_tasks(tmp_path, "llama")
    for number, folder in enumerate(folders):
        (folder / "vocab.bpe").write_text("common")
        (folder / "tokenizer.json").write_text(str(number))
        (folder / "trainer_state.json").write_text("{}")
        (folder / "eval_results.json").write_text(str(number))
    (folders[0] / "chat_template.jinja").write_text("{{ messages }}")
    generation = json.loads((folders[1] / "generation_config.json").read_text())
    generation["temperature"] = 0.5
    (folders[1] / "generation_config.json").write_text(json.dumps(generation))
    (folders[1] / "source.spm").write_text("two's")
    own = {folder.name: side_files(folder) for folder in folders}

    out = tmp_path / "out"
    result = invoke("compress", *folders, "--out", out)
    assert result.exit_code == 0, result.output
    for folder in folders:
        assert invoke("expand", out, folder.name, tmp_path / "full" / folder.name).exit_code == 0
        found = side_files(tmp_path / "full" / folder.name)
        assert found.keys() == own[folder.name].keys()
        for name, path in found.items():
            assert path.read_bytes() == own[folder.name][name].read_bytes(), name
        assert not (tmp_path / "full" / folder.name / "trainer_state.json").exists()
        assert not (tmp_path / "full" / folder.name / "eval_results.json").exists()
    assert not (out / "adapters" / "one" / "task_files").exists()
    stored = {path.name for path in (out / "adapters" / "two" / "task_files").iterdir()}
    assert stored == {"tokenizer.json", "generation_config.json", "source.spm"}
    told = "chat_template.jinja, tokenizer.json of three differ from the base's"
    assert told in result.output

    report = json.loads((out / "report.json").read_text())
    files = [path for path in (out / "adapters" / "two").iterdir() if path.is_file()]
    assert report["tasks"]["two"]["bytes"] == sum(path.stat().st_size for path in files)
    model = PeftModel.from_pretrained(load(out / "base"), out / "adapters" / "two").eval()
    full = answer(load(tmp_path / "full" / "two"))
    torch.testing.assert_close(answer(model), full, atol=2e-5, rtol=2e-5)


def test_files_that_all_have_are_stored_once(models, tmp_path):
    assert invoke("compress", *models, "--out", tmp_path / "out").exit_code == 0
    assert not list((tmp_path / "out").rglob("task_files"))
    assert (tmp_path / "out" / "base" / "generation_config.json").exists()


def test_a_task_gets_its_own_config_back(tmp_path):
    folders = save_tasks(tmp_path, "bert")
    config = json.loads((folders[1] / "config.json").read_text())
    config["id2label"] = {"0": "good", "1": "bad", "2": "ugly"}
    (folders[1] / "config.json").write_text(json.dumps(config))
    assert invoke("compress", *folders, "--out", tmp_path / "out").exit_code == 0
    assert invoke("expand", tmp_path / "out", "two", tmp_path / "full").exit_code == 0
    assert load(tmp_path / "full").config.id2label[2] == "ugly"


def _paths(models):
    return [Path(model) for model in models]
