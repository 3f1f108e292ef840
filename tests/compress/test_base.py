"""Adapters around a model that is given, rather than around the average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cart_plugin import CartError, RankRule, truncated_svd
from cart_plugin.cli import main
from cart_plugin.compress import compress, expand, load_task
from tests.compress.models import TASKS, answer, load, new_model, save_tasks, tensors


def save(folder: Path, kind: str, **config) -> tuple[list[Path], Path]:
    """Three tasks' models, and the one that they started from."""
    models = save_tasks(folder, kind, **config)
    config.pop("dtype", None)
    new_model(kind, **config).save_pretrained(folder / "pretrained")
    return models, folder / "pretrained"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"), "llama", num_hidden_layers=1)


@pytest.fixture
def base(originals, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(originals[1], tmp_path / "pretrained"))


def edit(folder: Path, make) -> None:
    """Replace a checkpoint's tensors."""
    file = folder / "model.safetensors"
    save_file(make(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_tasks_are_the_base_and_their_truncated_differences(kind, tmp_path):
    models, start = save(tmp_path, kind)
    out = tmp_path / "out"
    report = compress(models, out, base=start, rank=4, svd="exact")
    assert report.center == "base"
    around = tensors(start)
    assert all(torch.equal(tensor, around[name]) for name, tensor in tensors(out / "base").items())
    assert set(tensors(out / "base")) == set(around)
    for task, folder in zip(TASKS, models, strict=True):
        own = tensors(folder)
        for name, found in load_task(out, task).items():
            expected = own[name]
            if report.entries[name].kind == "lora":
                part = truncated_svd(own[name] - around[name], RankRule(rank=4), svd="exact")
                expected = around[name] + part.dense()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert", "convnext"])
def test_peft_loads_them_around_the_base(kind, tmp_path):
    models, start = save(tmp_path, kind)
    out = tmp_path / "out"
    compress(models, out, base=start, rank_ratio=0.25)
    expand(out, "two", tmp_path / "full")
    model = PeftModel.from_pretrained(load(out / "base"), out / "adapters" / "two").eval()
    full = answer(load(tmp_path / "full"))
    torch.testing.assert_close(answer(model), full, atol=2e-5, rtol=2e-5)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model), answer(load(start)))


def test_what_all_models_have_in_common_but_not_the_base_is_kept(originals, tmp_path):
    models, start = originals
    compress([models[0], models[0]], tmp_path / "out", names=["a", "b"], base=start, rank_ratio=1)
    own = tensors(models[0])
    for name, found in load_task(tmp_path / "out", "b").items():
        torch.testing.assert_close(found, own[name], atol=1e-5, rtol=1e-4)


def test_what_is_dropped_stays_at_the_base(originals, tmp_path):
    models, start = originals
    report = compress(models, tmp_path / "out", base=start, rank=2, drop_small=True)
    assert {entry.kind for entry in report.entries.values()} == {"lora", "base"}
    assert any("stay at the base (--drop-small)" in note for note in report.notes)
    assert not any("average" in note for note in report.notes)
    norm = load_task(tmp_path / "out", "one")["model.norm.weight"]
    assert torch.equal(norm, tensors(start)["model.norm.weight"])


def test_a_target_size_is_met_around_a_base(tmp_path):
    models, start = save(tmp_path, "llama", hidden_size=64, intermediate_size=256)
    ratio = compress(models, tmp_path / "ratio", base=start, rank_ratio=0.25)
    chosen = compress(models, tmp_path / "chosen", base=start, target_size=ratio.share)
    assert ratio.share - 0.01 <= chosen.share <= ratio.share
    assert chosen.squared_error < ratio.squared_error


def test_the_base_takes_the_models_dtype(tmp_path):
    models, start = save(tmp_path, "llama", dtype=torch.bfloat16)
    compress(models, tmp_path / "out", base=start, rank_ratio=1)
    around, stored = tensors(start), tensors(tmp_path / "out" / "base")
    assert all(torch.equal(tensor, around[name].bfloat16()) for name, tensor in stored.items())
    assert load(tmp_path / "out" / "base").dtype == torch.bfloat16
    own = tensors(models[1])
    for name, found in load_task(tmp_path / "out", "two").items():
        torch.testing.assert_close(found, own[name], atol=1e-2, rtol=1e-2)


def test_config_and_tokenizer_are_the_bases(originals, base, tmp_path):
    models, _ = originals
    tuned = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in models]
    for folder in tuned:
        configure(folder, rope_theta=5.0, pad_token_id=3)
        (folder / "tokenizer.json").write_text("tuned")
        (folder / "added_tokens.json").write_text("tuned")
    compress(tuned, tmp_path / "first", base=base)
    assert (tmp_path / "first" / "base" / "tokenizer.json").read_text() == "tuned"
    (base / "tokenizer.json").write_text("base")
    compress(tuned, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "base" / "tokenizer.json").read_text() == "base"
    assert not (tmp_path / "out" / "base" / "added_tokens.json").exists()
    assert load(tmp_path / "out" / "base").config.pad_token_id is None
    expand(tmp_path / "out", "two", tmp_path / "full")
    assert load(tmp_path / "full").config.pad_token_id == 3


def test_buffers_that_only_the_base_still_has_are_left_out(originals, base, tmp_path):
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(base, lambda held: {**held, **unused})
    compress(originals[0], tmp_path / "out", base=base)
    assert not unused.keys() & tensors(tmp_path / "out" / "base").keys()


def _without_norm(folder: Path) -> None:
    edit(folder, lambda held: {k: v for k, v in held.items() if k != "model.norm.weight"})


def _short_head(folder: Path) -> None:
    edit(folder, lambda held: {**held, "lm_head.weight": held["lm_head.weight"][:60].clone()})
    configure(folder, vocab_size=60)


def _nan(folder: Path) -> None:
    edit(folder, lambda held: {**held, "model.norm.weight": torch.full((32,), torch.nan)})


def _more_layers(folder: Path) -> None:
    new_model("llama", num_hidden_layers=2).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: configure(folder, architectures=["MistralForCausalLM"]),
            "model base is MistralForCausalLM but one is LlamaForCausalLM; models that share a "
            "base must have the same architecture",
        ),
        (_without_norm, "model base lacks 1 tensor that one has (model.norm.weight); "),
        (_more_layers, "model one lacks 9 tensors that base has (model.layers.1."),
        (_short_head, "tensor 'lm_head.weight' is (64, 32) in one but (60, 32) in base"),
        (_nan, "tensor 'model.norm.weight' of base holds 32 NaN or infinite values"),
        (lambda folder: (folder / "config.json").unlink(), "model base has no config.json"),
        (shutil.rmtree, "does not exist; name a local folder"),
    ],
)
def test_bad_bases_are_told_in_one_line(originals, base, tmp_path, spoil, message):
    spoil(base)
    with pytest.raises(CartError) as caught:
        compress(originals[0], tmp_path / "out", base=base)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_integers_that_differ_from_the_bases(tmp_path):
    models, start = save(tmp_path, "llama", num_hidden_layers=1)
    for folder, factor in [*((model, 1) for model in models), (start, 2)]:
        for file in sorted(folder.glob("*.safetensors"))[:1]:
            steps = {"steps": torch.arange(3) * factor}
            save_file({**load_file(file), **steps}, file, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            found = json.loads(index.read_text())
            found["weight_map"]["steps"] = file.name
            index.write_text(json.dumps(found))
    with pytest.raises(CartError, match="'steps' holds integers that differ between one and base"):
        compress(models, tmp_path / "out", base=start)


def test_a_model_that_the_dtype_does_not_hold(originals, base, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(base, large)
    edit(large, lambda held: {**held, "model.norm.weight": torch.full((32,), 1e6)})
    with pytest.raises(CartError, match=r"'model.norm.weight'.*leave the range of torch.float16"):
        compress([originals[0][0], large], tmp_path / "out", base=base, dtype="float16")


def test_models_that_are_the_base(base, tmp_path):
    with pytest.raises(CartError, match="hold the base's weights: there is nothing to compress"):
        compress([base, base], tmp_path / "out", names=["a", "b"], base=base)


def test_the_command_says_around_what(originals, tmp_path):
    models, start = originals
    for center, options, told in (
        ("average", [], "base (the average)"),
        ("base", ["--base", str(start)], "base (as given)"),
    ):
        out = tmp_path / center
        result = CliRunner().invoke(
            main, ["compress", *map(str, models), "--out", str(out), *options]
        )
        assert result.exit_code == 0, result.output
        assert told in result.output
        assert json.loads((out / "report.json").read_text())["center"] == center


def test_the_commands_errors_are_one_line(originals, tmp_path):
    arguments = [*map(str, originals[0]), "--base", str(tmp_path / "nowhere")]
    result = CliRunner().invoke(main, ["compress", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "nowhere does not exist" in result.output
    assert len(result.output.strip().splitlines()) == 1
