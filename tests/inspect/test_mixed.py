"""Adapters beside whole models: as the whole models that they make, a tensor at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from cart_plugin import CartError, merge_state_dicts
from cart_plugin.inspect import inspect_models
from cart_plugin.inspect.fused import Fused
from cart_plugin.inspect.merges import MERGED
from cart_plugin.inspect.sources import open_model
from tests.adapters.lora import save_base, save_lora, state
from tests.inspect.conftest import tune

Run = Callable[..., Result]


def save_gpt2(folder: Path) -> Path:
    """A base whose matrices are stored as (inputs, outputs)."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "base")
    return folder / "base"


def as_whole(base: Path, adapter: Path, folder: Path) -> Path:
    """The whole model that PEFT makes."""
    shutil.copytree(base, folder)
    save_file(state(base, adapter), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}}),
        ("qwen2", {"lora_bias": True}),
        ("qwen2", {"bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_what_is_read_is_what_peft_makes(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base = save_gpt2(tmp_path) if architecture == "gpt2" else save_base(tmp_path, architecture)
    folder = save_lora(tmp_path / "adapter", base, 0, **config)
    model = Fused(open_model(str(base), "base"), str(folder), "math")
    expected = state(base, folder)
    changed = 0
    for name in model.tensors:
        own = expected[name]
        assert torch.allclose(model.read(name), own, atol=1e-6), name
        changed += not torch.equal(own, model.base.read(name))
        if (found := model.difference(name)) is not None:
            dense = (found.left @ found.right).reshape(own.shape)
            assert torch.allclose(model.base.read(name) + dense, own, atol=1e-6), name
    assert changed >= 4


def test_a_convolutions_kernel_is_one_matrix(tmp_path: Path) -> None:
    base = save_base(tmp_path, "vit")
    kind = transformers.AutoModel
    target = {"target_modules": ["projection"], "kind": kind}
    folder = save_lora(tmp_path / "adapter", base, 0, **target)
    model = Fused(open_model(str(base), "base"), str(folder), "math")
    (name,) = [name for name in model.tensors if name.endswith("projection.weight")]
    expected = state(base, folder, kind)
    own = next(own for key, own in expected.items() if key.endswith("projection.weight"))
    assert torch.allclose(model.read(name), own, atol=1e-6)
    assert not torch.equal(model.read(name), model.base.read(name))


@pytest.fixture
def mixed(models: list[Path], adapters: list[Path]) -> list[Path]:
    return [models[0], adapters[1], adapters[2]]


def test_adapters_beside_a_whole_model_say_what_the_whole_models_say(
    mixed: list[Path], base: Path, tmp_path: Path
) -> None:
    whole = [as_whole(base, folder, tmp_path / folder.name) for folder in mixed[1:]]
    expected = inspect_models([mixed[0], *whole], base=base)
    found = inspect_models([mixed[0], f"{base}+{mixed[1]}", mixed[2]], base=base)
    assert found.names == expected.names
    assert found.models[found.names[2]] == f"{base}+{mixed[2]}"
    assert [movement.rank for movement in found.movements()][1:] == [4, 4]
    rows = zip(found.rows(), expected.rows(), strict=True)
    for row, other in rows:
        assert row.keys() == other.keys()
        for key in (*(key for key in row if key.startswith(("kept", "lost"))), "moved", "cosine"):
            known = None if other[key] is None else pytest.approx(other[key], rel=5e-3, abs=2e-3)
            assert row[key] == known, (key, row["tensor"], row["model"])


def test_the_base_of_one_is_that_of_all(mixed: list[Path], base: Path) -> None:
    rows = inspect_models([mixed[0], f"{base}+{mixed[1]}", mixed[2]]).rows()
    assert rows == inspect_models(mixed, base=base).rows()
    with pytest.raises(CartError, match=r"is an adapter.*name its base, as BASE\+"):
        inspect_models(mixed)


def test_adapters_of_two_bases_are_compared_as_whole_models(
    models: list[Path], adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    written = [f"{models[0]}+{adapters[0]}", f"{models[1]}+{adapters[1]}"]
    whole = [
        as_whole(model, adapter, tmp_path / name)
        for model, adapter, name in zip(models, adapters, ("a", "b"), strict=False)
    ]
    for start in (None, base):
        found, expected = (inspect_models(named, base=start) for named in (written, whole))
        moved = [movement.moved for movement in expected.movements()]
        assert [movement.moved for movement in found.movements()] == pytest.approx(moved, rel=1e-4)
        kept = expected.judgements()["average"].kept
        assert found.judgements()["average"].kept == pytest.approx(kept, rel=1e-3)


def test_adapters_of_another_base_are_not_taken_for_ones_of_the_base(
    models: list[Path], adapters: list[Path], base: Path
) -> None:
    found = inspect_models([f"{models[0]}+{folder}" for folder in adapters], base=base)
    alone = inspect_models(adapters, base=base)
    assert found.movements()[0].moved > 2 * alone.movements()[0].moved
    assert found.pairs()[0].cosine > 0.9


def test_a_whole_merge_of_adapters_is_judged(
    adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    dicts = [state(base, folder) for folder in adapters]
    save_file(merge_state_dicts(dicts), merged / "model.safetensors", {"format": "pt"})
    found = inspect_models([f"{base}+{folder}" for folder in adapters], merged=merged)
    judged = found.judgements()
    assert judged[MERGED].kept == pytest.approx(judged["cart"].kept, rel=5e-3)
    with pytest.raises(CartError, match="name its base"):
        inspect_models(adapters, merged=merged)


def test_a_recipe_may_mix_them(run: Run, mixed: list[Path], base: Path, tmp_path: Path) -> None:
    named = [str(mixed[0]), *(f"{base}+{folder}" for folder in mixed[1:])]
    recipe = tmp_path / "r.yaml"
    document = {"models": [{"model": name} for name in named], "base_model": str(base)}
    recipe.write_text(yaml.safe_dump({"merge_method": "cart_auto", **document}))
    text = run(recipe).output
    advised = yaml.safe_load(text.split("recommended\n")[1].split("\n- ")[0])
    assert [entry["model"] for entry in advised["models"]] == named
    assert text == run(*mixed, "--base", base).output


def test_inputs_are_measured_on_both_kinds(mixed: list[Path], base: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("1 2 3\n4 5 6\n")
    whole = [as_whole(base, folder, tmp_path / folder.name) for folder in mixed[1:]]
    inputs = [tmp_path / "texts.txt"]
    expected = inspect_models([mixed[0], *whole], base=base, inputs=inputs)
    found = inspect_models(mixed, base=base, inputs=inputs)
    for method, judged in expected.judgements("measured").items():
        other = found.judgements("measured")[method].lost
        assert other == pytest.approx(judged.lost, rel=5e-3, abs=2e-3), method


def test_another_adapter_is_measured_anew(models: list[Path], base: Path, tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "adapter", base, 0)
    out = tmp_path / "out"
    before = inspect_models([models[0], folder], base=base, out=out).rows()
    shutil.rmtree(folder)
    save_lora(folder, base, 1)
    assert inspect_models([models[0], folder], base=base, out=out).rows() != before


def test_adapters_that_do_not_fit_are_refused(
    models: list[Path], base: Path, tmp_path: Path
) -> None:
    folder = save_lora(tmp_path / "adapter", base, 0)
    other = save_base(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CartError, match=r"layers\.1\.self_attn.*does not hold as one tensor"):
        inspect_models([models[0], f"{other}+{folder}"], base=base)
    wide = save_base(tmp_path / "wide", num_hidden_layers=2, hidden_size=48)
    with pytest.raises(CartError, match="does not fit"):
        inspect_models([models[0], f"{wide}+{folder}"], base=base)
    file = base / "model.safetensors"
    with pytest.raises(CartError, match="is a weight file"):
        inspect_models([file, folder], base=file)
    break_adapter = load_file(folder / "adapter_model.safetensors")
    break_adapter[min(break_adapter)].view(-1)[0] = math.nan
    save_file(break_adapter, folder / "adapter_model.safetensors")
    with pytest.raises(CartError, match="adapter adapter holds 1 NaN"):
        inspect_models([models[0], folder], base=base)


def test_adapters_of_parameters_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path, "mixtral")
    target = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    folder = save_lora(tmp_path / "adapter", base, 0, **target)
    whole = tune(base, tmp_path / "whole", 1)
    with pytest.raises(CartError, match=r"target_parameters.*merge it into its base first"):
        inspect_models([whole, folder], base=base)
