"""Weights that are stored as (inputs, outputs) are judged by the inputs that they multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import save_file

from cart_plugin.checkpoints.orientation import turned_weights
from cart_plugin.inspect import inspect_models, inspect_state_dicts
from cart_plugin.inspect.fused import Fused
from cart_plugin.inspect.sources import open_model
from tests.adapters.lora import save_lora, state
from tests.doctor.tiny import change_config
from tests.inspect.conftest import tune
from tests.inspect.test_activations import records, save_gpt2
from tests.support import random

ALIKE = ("average", "task_arithmetic", "cart", "cart_auto", "cart_auto with base")
NAME = "layers.0.up.weight"


def test_gpt2s_models_say_what_its_adapters_say(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path)
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [save_lora(tmp_path / f"a{seed}", base, seed, **config) for seed in range(3)]
    whole = []
    for folder in folders:
        whole.append(tune(base, tmp_path / f"whole-{folder.name}", 0))
        save_file(state(base, folder), whole[-1] / "model.safetensors", {"format": "pt"})
    adapters = records(inspect_models(folders, base=base))
    assert len(adapters) == 6
    for written in (whole, [whole[0], *folders[1:]]):
        found = records(inspect_models(written, base=base))
        for name, expected in adapters.items():
            for key in ("row_overlap", "column_overlap"):
                for one, other in zip(found[name][key], expected[key], strict=True):
                    assert one == pytest.approx(other, rel=1e-2, abs=1e-3), (name, key)
            for method in ALIKE:
                for key in ("kept", "lost"):
                    other = expected["methods"][method][key]
                    assert found[name]["methods"][method][key] == pytest.approx(other, rel=5e-3)
            assert found[name]["from_base"]["I"] == pytest.approx(
                expected["from_base"]["I"], rel=1e-2
            )


@pytest.mark.parametrize("kind", ["GptOss", "Llama4Text"])
def test_stacked_experts_that_are_stored_turned_are_known(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 1}
    others = {} if kind == "GptOss" else {"intermediate_size_mlp": 48, "moe_layers": [0]}
    model: Any = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**sizes, **others)
    model(config).save_pretrained(tmp_path)
    found = turned_weights(open_model(str(tmp_path), "model"))
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", "down_proj"}


def test_ordinary_stacks_and_layers_are_not_turned(base: Path, tmp_path: Path) -> None:
    from tests.adapters.lora import save_base

    experts = save_base(tmp_path, "mixtral")
    assert turned_weights(open_model(str(base), "model")) == set()
    assert turned_weights(open_model(str(experts), "model")) == set()


def test_state_dicts_name_what_is_turned() -> None:
    dicts = [{NAME: random(24, 32, seed=seed)} for seed in range(3)]
    base = {NAME: random(24, 32, seed=9)}
    turned = [{NAME: own[NAME].mT.contiguous()} for own in dicts]
    expected = inspect_state_dicts(turned, base={NAME: base[NAME].mT.contiguous()})
    found = inspect_state_dicts(dicts, base=base, turned=[NAME])
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        for key in ("row_overlap", "column_overlap", "moved", "effective_rank"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), key
        for method in ALIKE:
            assert one[f"kept {method}"] == pytest.approx(other[f"kept {method}"], rel=1e-3)
    as_stored = inspect_state_dicts(dicts, base=base)
    assert found[0]["row_overlap"] != pytest.approx(as_stored[0]["row_overlap"], rel=1e-2)


def test_models_that_transformers_cannot_build_are_taken_as_they_are_stored(
    tmp_path: Path,
) -> None:
    base = save_gpt2(tmp_path)
    folders = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    files = [folder / "model.safetensors" for folder in folders]
    notes = inspect_models(files, names=["a", "b"]).notes
    assert any(note.startswith("weights are taken to be stored as (outputs") for note in notes)
    assert not any("stored as" in note for note in inspect_models(folders).notes)


def test_models_are_measured_anew_when_their_config_is_corrected(tmp_path: Path) -> None:
    """What it says of how weights are stored decides the records, and is not in their files."""
    base = save_gpt2(tmp_path)
    folders = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    out = tmp_path / "out"
    for folder in folders:
        change_config(folder, architectures=["MyGPT2"])
    notes = inspect_models(folders, base=base, out=out).notes
    assert any("MyGPT2" in note for note in notes)
    for folder in folders:
        change_config(folder, architectures=["GPT2LMHeadModel"])
    again = inspect_models(folders, base=base, out=out)
    assert not any("stored as" in note for note in again.notes)
    assert records(again) == records(inspect_models(folders, base=base))


def test_what_transformers_says_of_a_fused_models_base_is_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_gpt2(tmp_path)
    config = {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    adapter = str(save_lora(tmp_path / "adapter", base, 1, **config))
    opened = open_model(str(base), "base")
    before = Fused(opened, adapter, "a").identity()
    assert Fused(opened, adapter, "a").identity() == before
    monkeypatch.setattr("cart_plugin.inspect.fused.turned_parameters", lambda model: set())
    assert Fused(opened, adapter, "a").identity() != before
