"""Adapters of the layout that servers take, and what is said of who loads them."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from cart_plugin import CartError
from cart_plugin.checkpoints.servers import Loader, summary
from cart_plugin.cli import main
from cart_plugin.compress import compress, expand, load_task
from cart_plugin.compress.layers import Structure
from cart_plugin.compress.servers import checked_layout, why_left
from tests.compress.models import TASKS, answer, load, new_model, save_tasks, tensors

ROUNDING = 2e-5
SERVERS = {"layout": "servers", "rank_ratio": 0.25}


def config_of(made, task="one"):
    return json.loads((made.adapter(task) / "adapter_config.json").read_text())


def said_of(report, name):
    (found,) = [loader for loader in report.loaders if loader.name == name]
    return found


@pytest.mark.parametrize("kind", ["bert", "llama", "tied-llama", "qwen2", "qwen3-moe", "vit"])
def test_peft_answers_and_merges_like_the_expanded_model(kind, compressed, tmp_path):
    made = compressed(kind, **SERVERS)
    expand(made.out, "two", tmp_path / "two")
    full = answer(load(tmp_path / "two"))
    assert (answer(load(made.base)) - full).abs().max() > 100 * ROUNDING
    model = PeftModel.from_pretrained(load(made.base), made.adapter("two")).eval()
    torch.testing.assert_close(answer(model), full, atol=ROUNDING, rtol=ROUNDING)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged), full, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3-moe"])
@pytest.mark.parametrize("rule", [{"rank_ratio": 0.25}, {"energy": 0.7}, {"target_size": 0.85}])
def test_files_hold_a_and_b_of_one_rank_and_nothing_else(kind, rule, compressed):
    made = compressed(kind, layout="servers", **rule)
    for task in TASKS:
        config, stored = config_of(made, task), tensors(made.adapter(task))
        assert config["r"] == config["lora_alpha"]
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert not config["modules_to_save"]
        assert not config["target_parameters"]
        assert config["lora_bias"] is False
        assert config["bias"] == "none"
        for name, tensor in stored.items():
            side = name.removesuffix(".weight").rpartition(".")[2]
            assert tensor.shape[{"lora_A": 0, "lora_B": 1}[side]] == config["r"], name


def test_the_rank_is_the_largest_that_the_rule_gives_a_layer(compressed):
    made = compressed("llama", **SERVERS)
    ranks = {
        name: entry.ranks for name, entry in made.report.entries.items() if entry.kind == "lora"
    }
    assert config_of(made)["r"] == 8  # a quarter of 32; of the keys' 16 it would be 4
    assert {tuple(found) for found in ranks.values()} == {(8, 8, 8)}
    plain = compressed("llama", rank_ratio=0.25, drop_small=True).report
    name = "model.layers.0.self_attn.k_proj.weight"
    assert plain.entries[name].ranks == [4, 4, 4]
    assert made.report.entries[name].losses[0].lost < plain.entries[name].losses[0].lost


def test_a_layer_without_as_many_directions_is_padded_with_zeros(compressed):
    made = compressed("llama", layout="servers", rank=24)
    stored = tensors(made.adapter("one"))
    prefix = "base_model.model.model.layers.0.self_attn.k_proj"
    a, b = stored[f"{prefix}.lora_A.weight"], stored[f"{prefix}.lora_B.weight"]
    assert a.shape == (24, 32)
    assert b.shape == (16, 24)
    assert a[:16].abs().sum(1).min() > 0
    assert a[16:].abs().max() == b[:, 16:].abs().max() == 0
    name = "model.layers.0.self_attn.k_proj.weight"
    assert made.report.entries[name].ranks == [16, 16, 16]
    own = tensors(made.models[0])[name]
    torch.testing.assert_close(load_task(made.out, "one")[name], own, atol=1e-5, rtol=1e-5)


def test_a_target_size_counts_the_padding_and_is_met(tmp_path):
    folders = save_tasks(tmp_path, "llama", num_key_value_heads=1)
    target = 0.85
    report = compress(folders, tmp_path / "out", layout="servers", target_size=target)
    files = [*(tmp_path / "out" / "base").glob("*.safetensors")]
    files += [file for file in (tmp_path / "out" / "adapters").rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    ranks = [max(e.ranks[task] for e in report.entries.values() if e.ranks) for task in range(3)]
    layers = [entry.shape for entry in report.entries.values() if entry.kind == "lora"]
    one_more = 4 * sum(m + n for m, n in layers)
    assert report.bytes == written <= target * report.models_bytes < written + one_more
    assert min(ranks) > 8  # the rank of keys and values, which are padded


def test_a_target_size_spends_on_the_task_that_needs_it(tmp_path):
    folders = save_tasks(tmp_path, "llama")
    moved = load(folders[0])
    start = tensors(folders[1])
    for name, parameter in moved.named_parameters():
        parameter.data.copy_(start[name] + 4 * (parameter.data - start[name]))
    moved.save_pretrained(folders[0])
    report = compress(folders, tmp_path / "out", layout="servers", target_size=0.6)
    ranks = [max(e.ranks[task] for e in report.entries.values() if e.ranks) for task in range(3)]
    assert ranks[0] > ranks[1]
    assert report.share <= 0.6


def test_what_stays_at_the_base_is_listed_with_its_size_and_loss(compressed):
    made = compressed("qwen3-moe", **SERVERS)
    document = json.loads((made.out / "report.json").read_text())
    rows = {row["reason"].removeprefix("servers take no "): row for row in document["left"]}
    assert rows.keys() == {
        "embeddings",
        "heads",
        "norms and other vectors",
        "stacked experts",
        "matrices of no linear layer",  # the router
    }
    whole = tensors(made.models[0])
    size = whole["model.embed_tokens.weight"].numel() * 4
    assert rows["embeddings"]["names"] == ["model.embed_tokens.weight"]
    assert rows["embeddings"]["bytes"] == size
    experts = rows["stacked experts"]
    stored = [tensor for name, tensor in whole.items() if ".experts." in name]
    assert experts["bytes"] == sum(tensor.numel() * 4 for tensor in stored)
    lost = sum(loss.lost for name in experts["names"] for loss in made.report.entries[name].losses)
    assert experts["of_lost"] == pytest.approx(lost / made.report.squared_error)
    assert experts["error"] == max(
        loss.error for name in experts["names"] for loss in made.report.entries[name].losses
    )
    for name in experts["names"]:
        for loss in made.report.entries[name].losses:
            assert loss.lost == loss.difference > 0
    assert all(any(row["reason"] in note for note in made.report.notes) for row in rows.values())


def test_biases_stay_at_the_base(compressed):
    made = compressed("qwen2", **SERVERS)
    entry = made.report.entries["model.layers.0.self_attn.q_proj.bias"]
    assert (entry.kind, entry.reason) == ("averaged", "servers take no biases")


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "servers take no Conv1D layers"),
        (
            "vit",
            "vit.embeddings.patch_embeddings.projection.weight",
            "servers take no convolutions",
        ),
        ("gpt-oss", "model.layers.0.mlp.experts.down_proj", "servers take no stacked experts"),
        # Left only where PEFT refuses the module.
        ("llama", "model.layers.0.mlp.up_proj.weight", "PEFT gives its module no LoRA"),
    ],
)
def test_a_tensor_is_left_for_what_it_is(kind, name, why):
    model = new_model(kind)
    assert why_left(Structure(model, list(model.state_dict())), name) == why


@pytest.mark.parametrize("kind", ["gpt2", "resnet"])
def test_models_without_linear_layers_are_refused_before_anything_is_written(kind, tmp_path):
    models = save_tasks(tmp_path, kind)
    with pytest.raises(CartError, match="linear layer's weights, all that the layout servers"):
        compress(models, tmp_path / "out", layout="servers")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_an_alpha_is_one_line(compressed, tmp_path):
    made = compressed("llama", rank_ratio=0.25)
    broken = tmp_path / "broken"
    adapter = broken / "adapters" / "one"
    adapter.mkdir(parents=True)
    held = ("adapters/one/adapter_model.safetensors", "adapters/one/base.json")
    for part in ("base", "report.json", *held):
        (broken / part).symlink_to(made.out / part)
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config_of(made), "lora_alpha": None})
    )
    with pytest.raises(CartError, match=r"has lora_alpha None and r \d+, which were equal"):
        load_task(broken, "one")


def test_a_bias_that_leaves_the_dtypes_range_is_refused(tmp_path):
    folders = save_tasks(tmp_path, "qwen2")
    name = "model.layers.0.self_attn.q_proj.bias"
    for folder, value in zip(folders, (6e4, -6e4, -6e4), strict=True):
        model = load(folder)
        model.get_parameter(name).data.fill_(value)
        model.save_pretrained(folder)
    with pytest.raises(CartError, match=r"q_proj.bias': its factors leave the range of torch"):
        compress(folders, tmp_path / "out", rank_ratio=0.25, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_report_says_who_loads_what_servers_take(compressed):
    report = compressed("llama", **SERVERS).report
    assert [loader.loads for loader in report.loaders] == [True] * 4
    assert said_of(report, "vLLM").hint == "--max-lora-rank 8"
    assert said_of(report, "SGLang").hint == "--max-lora-rank 8"
    document = json.loads((report.out / "report.json").read_text())
    assert document["layout"] == "servers"
    assert document["loaded_by"]["vLLM"] == {"loads": True, "with": "--max-lora-rank 8"}


def test_the_report_says_why_servers_load_not_what_peft_does(compressed):
    report = compressed("qwen2").report
    assert said_of(report, "PEFT").loads
    for name in ("vLLM", "SGLang", "llama.cpp"):
        loader = said_of(report, name)
        assert loader.loads is False
        assert not loader.silent
        assert any("stored whole (modules_to_save): " in r for r in loader.reasons)
        assert any("takes no biases: model.layers.0" in reason for reason in loader.reasons)


def test_ranks_that_differ_are_for_vllm_and_llama_cpp_but_not_for_sglang(compressed):
    report = compressed("llama", rank_ratio=0.25, drop_small=True).report
    assert said_of(report, "vLLM").hint == "0.32 or later, --max-lora-rank 8"
    assert said_of(report, "llama.cpp").loads
    (reason,) = said_of(report, "SGLang").reasons
    assert "one rank for all layers" in reason


def test_stacked_experts_are_promised_to_no_server(compressed):
    report = compressed("qwen3-moe", rank_ratio=0.25, drop_small=True).report
    for name in ("vLLM", "SGLang", "llama.cpp"):
        assert any("stacked experts" in reason for reason in said_of(report, name).reasons)


def test_of_an_architecture_that_nobody_has_tried_nothing_is_promised(compressed):
    report = compressed("bert", **SERVERS).report
    loader = said_of(report, "vLLM")
    assert loader.loads is None
    assert "BertForSequenceClassification has not been tried" in loader.reasons[0]
    assert "not tried with vLLM, SGLang, llama.cpp" in summary(report.loaders)


def test_ranks_beyond_those_of_vllm_are_not_promised_to_it(tmp_path):
    sizes = {"hidden_size": 544, "intermediate_size": 544, "num_hidden_layers": 1}
    models = save_tasks(tmp_path, "llama", **sizes)
    report = compress(models, tmp_path / "out", layout="servers", rank=520, svd="exact")
    loader = said_of(report, "vLLM")
    assert loader.reasons == ("it allows ranks up to 512, and here is one of 520",)
    assert said_of(report, "llama.cpp").loads


@pytest.mark.parametrize(
    ("moved", "lonely"),
    [
        (("q_proj",), "model.layers.0.self_attn.q_proj"),
        (("up_proj",), "model.layers.0.mlp.up_proj"),
        (("q_proj", "v_proj"), ""),
        (("o_",), ""),
    ],
)
def test_sglang_wants_the_layers_that_it_fuses_together(moved, lonely, tmp_path):
    folders = save_tasks(tmp_path, "llama")
    start = tensors(folders[0])
    for folder in folders[1:]:
        model = load(folder)
        for name, parameter in model.named_parameters():
            if not any(part in name for part in moved):
                parameter.data.copy_(start[name])
        model.save_pretrained(folder)
    report = compress(folders, tmp_path / "out", layout="servers", rank=4)
    loader = said_of(report, "SGLang")
    assert loader.loads == (not lonely)
    if lonely:
        assert loader.reasons[0].endswith(f"belong to {lonely}")
    assert said_of(report, "llama.cpp").loads


def test_the_last_line_names_who_loads_the_adapters(tmp_path):
    models = [str(folder) for folder in save_tasks(tmp_path, "llama")]
    runner = CliRunner()
    arguments = [*models, "--layout", "servers", "--rank", "12", "--out", str(tmp_path / "a")]
    result = runner.invoke(main, ["compress", *arguments])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == (
        "loaded by PEFT, vLLM (--max-lora-rank 16), SGLang (--max-lora-rank 12), llama.cpp"
    )
    assert "(servers take no heads): 8,192 bytes of each model" in result.output
    result = runner.invoke(main, ["compress", *models, "--out", str(tmp_path / "b")])
    assert result.output.splitlines()[-1] == (
        "loaded by PEFT; not by vLLM, SGLang, llama.cpp (report.json says why)"
    )


@pytest.mark.parametrize(
    ("left", "server"), [(("embed", "lm_head"), "llama.cpp"), (("norm", "lm_head"), "SGLang")]
)
def test_servers_that_skip_what_is_stored_whole_are_warned_of(left, server, tmp_path):
    folders = save_tasks(tmp_path, "llama")
    start = tensors(folders[0])
    for folder in folders[1:]:
        model = load(folder)
        for name, parameter in model.named_parameters():
            if any(part in name for part in left):
                parameter.data.copy_(start[name])
        model.save_pretrained(folder)
    report = compress(folders, tmp_path / "out", rank=4)
    assert [loader.name for loader in report.loaders if loader.silent] == [server]
    assert said_of(report, server).loads is False
    warned = [note for note in report.notes if note.startswith("give these adapters not to")]
    assert len(warned) == 1
    assert f"not to {server}: it leaves out model." in warned[0]


def test_a_layout_has_a_name(originals, tmp_path):
    assert checked_layout("servers") == "servers"
    with pytest.raises(CartError, match=r"layout must be one of peft, servers, got 'vllm'"):
        compress(originals, tmp_path / "out", layout="vllm")
    with pytest.raises(CartError, match=r"layout='servers' leaves out more than small_error=0.1"):
        compress(originals, tmp_path / "out", layout="servers", small_error=0.1)


def test_a_summary_has_a_part_for_each_kind_of_answer():
    found = [Loader("A", True, "x 1"), Loader("B", False), Loader("C", None)]
    assert summary(found) == (
        "loaded by A (x 1); not by B (report.json says why); not tried with C"
    )
