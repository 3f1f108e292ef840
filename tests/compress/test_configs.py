"""Models whose configs differ: an adapter runs with the base's, and the report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cart_plugin import CartError
from cart_plugin.compress import compress
from tests.compress.models import new_model, save_tasks


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    new_model("llama", num_hidden_layers=1).save_pretrained(folder / "pretrained")
    return [*save_tasks(folder, "llama", num_hidden_layers=1), folder / "pretrained"]


@pytest.fixture
def folders(originals, tmp_path):
    """Copies that a test may change; the last is of the model before fine-tuning."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in originals]


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def notes(folders, tmp_path, around_base: bool) -> list[str]:
    base = folders[-1] if around_base else None
    return compress(folders[:-1], tmp_path / "out", base=base, rank=4).notes


@pytest.mark.parametrize("around_base", [False, True])
def test_differences_that_change_answers_are_noted(folders, tmp_path, around_base):
    edit(folders[1], lambda config: config.update(rms_norm_eps=0.1))
    edit(folders[2], lambda config: config["rope_parameters"].update(rope_theta=5.0))
    (note,) = notes(folders, tmp_path, around_base)
    told = "the config of two, three differs from the base's in rms_norm_eps, rope_parameters"
    assert note.startswith(told)
    assert "`mergekit-cart expand` gives every model its own" in note


def test_a_base_with_another_config_than_all(folders, tmp_path):
    edit(folders[-1], lambda config: config.update(hidden_act="relu"))
    (note,) = notes(folders, tmp_path, True)
    assert note.startswith("the config of one, two, three differs from the base's in hidden_act:")


def test_names_versions_and_dtypes_are_no_difference(folders, tmp_path):
    kept = {"_name_or_path": "me/tuned", "transformers_version": "4.40.0", "dtype": "bfloat16"}
    edit(folders[1], lambda config: config.update(kept))
    assert not notes(folders, tmp_path, True)


def test_a_default_that_is_spelt_out_is_no_difference(folders, tmp_path):
    edit(folders[1], lambda config: config.pop("attention_bias"))
    assert not notes(folders, tmp_path, True)


def test_a_config_that_transformers_cannot_read(folders, tmp_path):
    edit(folders[1], lambda config: config.update(model_type="unheard-of"))
    with pytest.raises(CartError, match="model two: transformers cannot read its config") as caught:
        compress(folders[:-1], tmp_path / "out")
    assert "\n" not in str(caught.value)
