"""Bad input, full disks and killed runs: one clear line, and nothing that looks finished."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cart_plugin import CartError
from cart_plugin.compress import adapters, writing
from cart_plugin.indexing import compress, expand, load_task, task_tensors, tasks
from tests.compress.models import TASKS, save_tasks, tensors


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("models"), "llama", num_hidden_layers=1)


@pytest.fixture
def models(originals, tmp_path):
    """Copies that a test may break."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in originals]


def refusal(models, tmp_path, **options) -> str:
    """The message with which compression is refused; nothing is left behind."""
    out = tmp_path / "out"
    with pytest.raises(CartError) as caught:
        compress(models, out, **options)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(folder: Path, name: str, make) -> None:
    """Replace a tensor of a checkpoint."""
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name] = make(held[name])
            save_file(held, file, metadata={"format": "pt"})


def configure(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_one_model_is_too_few(models, tmp_path):
    assert "at least two models" in refusal(models[:1], tmp_path)


def test_a_model_that_is_not_there(models, tmp_path):
    assert "does not exist" in refusal([*models, tmp_path / "nowhere"], tmp_path)


def test_a_file_instead_of_a_folder(models, tmp_path):
    assert "is a file" in refusal([*models, models[0] / "config.json"], tmp_path)


def test_other_architectures(models, tmp_path):
    configure(models[1], architectures=["MistralForCausalLM"])
    assert refusal(models, tmp_path) == (
        "model two is MistralForCausalLM but one is LlamaForCausalLM; models that share a base "
        "must have the same architecture"
    )


def test_an_architecture_that_transformers_lacks(models, tmp_path):
    for folder in models:
        configure(folder, architectures=["MyOwnModel"])
    assert "has no MyOwnModel" in refusal(models, tmp_path)


def test_no_architecture(models, tmp_path):
    for folder in models:
        configure(folder, architectures=None)
    assert "does not name one architecture" in refusal(models, tmp_path)


def test_a_config_of_other_sizes(models, tmp_path):
    for folder in models:
        configure(folder, hidden_size=64)
    assert "correct config.json" in refusal(models, tmp_path)


def test_other_shapes(models, tmp_path):
    change(models[2], "lm_head.weight", lambda tensor: tensor[:60].clone())
    message = refusal(models, tmp_path)
    assert "'lm_head.weight' is (64, 32) in one but (60, 32) in three" in message


def test_other_heads_are_named(tmp_path):
    first = save_tasks(tmp_path / "a", "bert", num_labels=2)[0]
    second = save_tasks(tmp_path / "b", "bert", num_labels=3)[1]
    message = refusal([first, second], tmp_path)
    assert "'classifier.bias' is (2,) in one but (3,) in two" in message
    assert "heads" in message


def test_a_missing_tensor(models, tmp_path):
    index = models[1] / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(found))
    assert "model two lacks 1 tensors that one has" in refusal(models, tmp_path)


def test_a_missing_shard(models, tmp_path):
    shard = sorted(models[1].glob("*.safetensors"))[-1]
    shard.unlink()
    assert f"model two: shard {shard.name} is missing" in refusal(models, tmp_path)


def test_a_shard_without_what_the_index_lists(models, tmp_path):
    index = models[1] / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["extra.weight"] = found["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(found))
    assert "lacks extra.weight, which" in refusal(models, tmp_path)


def test_a_truncated_shard(models, tmp_path):
    shard = sorted(models[1].glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "truncated" in refusal(models, tmp_path)


def test_pickled_weights(models, tmp_path):
    for file in models[0].glob("model*"):
        file.unlink()
    torch.save({}, models[0] / "pytorch_model.bin")
    assert ".bin files, which are not read" in refusal(models, tmp_path)


def test_values_that_are_not_finite(models, tmp_path):
    change(models[1], "model.norm.weight", lambda tensor: tensor.fill_(float("nan")))
    message = refusal(models, tmp_path)
    assert "'model.norm.weight' of two holds 32 NaN or infinite values" in message


def test_quantised_weights(models, tmp_path):
    for folder in models:
        change(folder, "model.norm.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    assert "quantised weights cannot be averaged" in refusal(models, tmp_path)


def test_integers_in_one_model_only(models, tmp_path):
    change(models[1], "model.norm.weight", lambda tensor: tensor.to(torch.int64))
    assert "is torch.int64 in two but torch.float32 in one" in refusal(models, tmp_path)


def test_integers_that_disagree(models, tmp_path):
    for number, folder in enumerate(models):
        index = folder / "model.safetensors.index.json"
        found = json.loads(index.read_text())
        found["weight_map"]["steps"] = "steps.safetensors"
        index.write_text(json.dumps(found))
        save_file({"steps": torch.arange(3) * number}, folder / "steps.safetensors")
    assert "integers that differ between one and two" in refusal(models, tmp_path)


def test_equal_models(models, tmp_path):
    assert "nothing to compress" in refusal([models[0], models[0]], tmp_path, names=["a", "b"])


def test_names(models, tmp_path):
    assert "two models are called 'a'" in refusal(models, tmp_path, names=["a", "b", "a"])
    assert "3 models but 2 names" in refusal(models, tmp_path, names=["a", "b"])
    assert "cannot name" in refusal(models, tmp_path, names=["a", "b", "../c"])
    assert "cannot name" in refusal(models, tmp_path, names=["a", "b", ".c"])


def test_two_rules(models, tmp_path):
    message = refusal(models, tmp_path, rank=4, target_size=0.5)
    assert "rank=4 and target_size=0.5 are two rules" in message


def test_two_bounds(models, tmp_path):
    message = refusal(models, tmp_path, drop_small=True, small_error=0.1)
    assert message == "drop_small leaves out more than small_error=0.1; give one of them"


@pytest.mark.parametrize(
    "options",
    [
        {"rank_ratio": 2},
        {"rank": -1},
        {"energy": 2},
        {"target_size": 0},
        {"target_size": 1.5},
        {"dtype": "int8"},
        {"svd": "magic"},
        {"small_error": 1},
        {"small_error": -0.1},
        {"small_error": float("nan")},
        {"small_error": True},
    ],
)
def test_values_out_of_range(models, tmp_path, options):
    assert next(iter(options)) in refusal(models, tmp_path, **options)


def test_a_dtype_that_does_not_hold_the_weights(models, tmp_path):
    change(models[1], "model.norm.weight", lambda tensor: tensor.fill_(1e6))
    assert "leave the range of torch.float16" in refusal(models, tmp_path, dtype="float16")


def test_a_folder_that_exists_is_left_alone(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CartError, match="exists; name a new folder"):
        compress(models, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(models, tmp_path):
    (tmp_path / "out").mkdir()
    compress(models, tmp_path / "out")
    assert tasks(tmp_path / "out") == list(TASKS)


def test_a_folder_of_another_is_not_cleared(models, tmp_path):
    other = tmp_path / ".out.unfinished"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(CartError, match="in the way"):
        compress(models, tmp_path / "out")
    assert (other / "mine").exists()


def test_two_runs_do_not_mix(models, tmp_path):
    with writing.unfinished(tmp_path / "out"):
        with pytest.raises(CartError, match="another run is writing"):
            compress(models, tmp_path / "out")
        assert (tmp_path / ".out.unfinished").exists()


def test_too_small_a_disk_is_noticed_before(models, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda place: usage(1, 1, 1000))
    assert "1,000 bytes free and" in refusal(models, tmp_path)


def test_a_disk_that_runs_full(models, tmp_path, monkeypatch):
    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.TensorFile, "write", full)
    assert "the disk is full" in refusal(models, tmp_path)


def test_an_error_half_way_leaves_nothing(models, tmp_path, monkeypatch):
    done = []

    def broken(*arguments):
        done.append(arguments)
        if len(done) == 4:
            raise RuntimeError("half-way")
        return real(*arguments)

    real = adapters.decompose
    monkeypatch.setattr(adapters, "decompose", broken)
    with pytest.raises(RuntimeError, match="half-way"):
        compress(models, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TASKS)


def test_a_killed_run_leaves_nothing_finished_and_the_next_completes(models, tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, sys\n"
        "from cart_plugin.compress import adapters, run\n"
        "real, done = adapters.decompose, []\n"
        "def kill(*arguments):\n"
        "    done.append(1)\n"
        "    if len(done) == 4: os._exit(9)\n"
        "    return real(*arguments)\n"
        "adapters.decompose = kill\n"
        "run.compress(sys.argv[2:], sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, out, *models], check=False)
    assert killed.returncode == 9
    assert not out.exists()
    left = tmp_path / ".out.unfinished"
    assert left.is_dir()
    assert not (left / "report.json").exists()
    compress(models, out)
    assert not left.exists()
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "base", "report.json"]
    fresh = compress(models, tmp_path / "fresh")
    for task in TASKS:
        one, other = (tensors(place / "adapters" / task) for place in (out, fresh.out))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_expand_names_what_it_does_not_find(models, tmp_path):
    with pytest.raises(CartError, match="is no folder that `mergekit-cart compress` has written"):
        expand(tmp_path, "one", tmp_path / "full")
    compress(models, tmp_path / "out")
    with pytest.raises(CartError, match="has no task 'four'; it has one, two, three"):
        expand(tmp_path / "out", "four", tmp_path / "full")
    (tmp_path / "out" / "adapters" / "two" / "adapter_model.safetensors").unlink()
    with pytest.raises(CartError, match="adapter two"):
        load_task(tmp_path / "out", "two")
    with pytest.raises(CartError, match="exists; name a new folder"):
        expand(tmp_path / "out", "one", models[0])
    assert not (tmp_path / "full").exists()


def test_a_task_is_read_one_tensor_at_a_time(models, tmp_path):
    compress(models, tmp_path / "out")
    expand(tmp_path / "out", "one", tmp_path / "full")
    written = tensors(tmp_path / "full")
    read = dict(task_tensors(tmp_path / "out", "one"))
    assert set(read) == set(written) == set(load_task(tmp_path / "out", "one"))
    assert all(torch.equal(read[name], written[name]) for name in read)
