"""Bad input: one clear line, and nothing that looks finished."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cart_plugin import CartError
from cart_plugin.compress import compress, expand, load_task, task_tensors, tasks
from tests.compress.models import save_tasks, tensors
from tests.compress.refused import change, configure, refusal


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
    shard = models[1] / found["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(found))
    assert "index.json leaves out model.norm.weight" in refusal(models, tmp_path)
    held = load_file(shard)
    del held["model.norm.weight"]
    save_file(held, shard)
    assert "model two lacks 1 tensor that one has (" in refusal(models, tmp_path)


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


def test_packed_weights(models, tmp_path):
    for folder in models:
        change(folder, "model.norm.weight", lambda tensor: tensor.to(torch.uint32))
    message = refusal(models, tmp_path)
    assert "tensor 'model.norm.weight' is U32; quantised weights cannot be averaged" in message
    assert "again" not in message


def test_a_config_of_quantised_weights(models, tmp_path):
    configure(models[1], quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(models, tmp_path)
    assert "model two: config.json has a quantization_config; quantised weights" in message


@pytest.mark.parametrize(
    "text",
    ["[]", '{"a": []}', '{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}', "\xff"],
)
def test_headers_that_are_none(models, tmp_path, text):
    shard = sorted(models[1].glob("*.safetensors"))[0]
    content = text.encode("latin-1")
    shard.write_bytes(len(content).to_bytes(8, "little") + content + b"1234")
    found = refusal(models, tmp_path)
    assert found.startswith(f"model two: {shard.name} is not a whole safetensors file (")


@pytest.mark.parametrize("shard", [1, ["a.safetensors"], None])
def test_an_index_that_names_no_files(models, tmp_path, shard):
    index = models[1] / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(found))
    assert "names no file for model.norm.weight" in refusal(models, tmp_path)


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
    assert "cannot name" in refusal(models, tmp_path, names=["a", "", "c"])
    message = refusal(models, tmp_path, names=["a", "b", "Mistral-7B-v0.1"])
    assert "'Mistral-7B-v0.1' cannot name an adapter: PEFT takes no dots" in message
    assert "use 'Mistral-7B-v0_1'" in message
    for name in ("weight", "bfloat16", "train", "items"):
        message = refusal(models, tmp_path, names=["a", "b", name])
        assert f"{name!r} cannot name an adapter: to PEFT it means something else" in message
        assert f"use '{name}_'" in message


def test_folders_with_dots_give_names_without(models, tmp_path):
    dotted = models[1].rename(tmp_path / "Mistral-7B-v0.1")
    report = compress([models[0], dotted], tmp_path / "out", rank=2)
    assert tasks(tmp_path / "out") == ["one", "Mistral-7B-v0_1"]
    assert any("are called Mistral-7B-v0_1 (Mistral-7B-v0.1)" in note for note in report.notes)
    other = models[2].rename(tmp_path / "Mistral-7B-v0_1")
    message = refusal([dotted, other], tmp_path / "other")
    assert "two models are called 'Mistral-7B-v0_1'" in message


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
