"""Models that bring their own code: run with mergekit's flag for it, and only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.doctor.tiny import change_config, load_tensors, save_models, write_recipe
from tests.execution.test_command import refuses

FILES = {
    "configuration_own.py": (
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    ),
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    ),
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of three models with code of their own."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    models = save_models(tmp_path / "models", "llama", num_hidden_layers=1)
    for model in models:
        auto = {"AutoConfig": "configuration_own.OwnConfig"}
        auto["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
        change_config(model, architectures=["OwnForCausalLM"], model_type="own", auto_map=auto)
        for name, text in FILES.items():
            (Path(model) / name).write_text(text)
    return write_recipe(tmp_path / "r.yaml", models)


def test_with_the_flag_they_are_merged(
    merge: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    done = merge(recipe, tmp_path / "out", "--trust-remote-code")
    assert done.exit_code == 0, done.output
    assert "merged by mergekit's plan" in done.output.splitlines()[-1]
    assert "tensor by tensor" not in done.output
    held = load_tensors(tmp_path / "models" / "llama-0")
    assert load_tensors(tmp_path / "out").keys() == held.keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES.keys()


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_without_it_the_message_names_it(
    options: list[str], merge: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    refuses(merge(recipe, tmp_path / "out", *options), "own code", "--trust-remote-code")
