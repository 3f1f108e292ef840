"""What the models' layers get as inputs, in the report of whole models and of adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cart_plugin import CartError
from cart_plugin.inspect import inspect_models
from cart_plugin.inspect.merges import MERGED
from tests.adapters.lora import state
from tests.inspect.conftest import NAMES

DOWN = "model.layers.1.mlp.down_proj.weight"


def test_inputs_are_those_of_the_models_layers(
    models: list[Path], base: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{number} {number + 1} 7 3" for number in range(20)))
    found = inspect_models(models, base=base, inputs=[texts])
    measured = found.judgements("measured")
    assert measured.keys() == found.judgements().keys()
    # A merged model that is one of them answers as it does, on its own inputs.
    one = inspect_models(models, base=base, merged=models[1], inputs=[texts])
    assert one.judgements("measured")[MERGED].lost[1] == pytest.approx(0, abs=1e-6)
    assert one.judgements("measured")[MERGED].lost[0] > 0.1
    record = next(entry for entry in one.records if entry["tensor"] == DOWN)
    assert record["methods"][MERGED]["measured"]["own"][2] > 0


def test_inputs_of_adapters_are_those_of_the_whole_models(
    adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("1 2 3\n4 5 6\n")
    for folder in adapters:
        place = Path(shutil.copytree(base, tmp_path / folder.name))
        save_file(state(base, folder), place / "model.safetensors", {"format": "pt"})
    inputs = [tmp_path / "texts.txt"]
    whole = inspect_models([tmp_path / name for name in NAMES], base=base, inputs=inputs)
    found = inspect_models(adapters, base=base, inputs=inputs)
    for method, judged in whole.judgements("measured").items():
        other = found.judgements("measured")[method].lost
        assert other == pytest.approx(judged.lost, rel=5e-3), method
    with pytest.raises(CartError, match="name its folder"):
        inspect_models(adapters, inputs=inputs)


def test_inputs_that_are_none_are_refused(models: list[Path], base: Path, tmp_path: Path) -> None:
    empty, folder = tmp_path / "empty.txt", tmp_path / "images"
    empty.write_text("\n\n")
    folder.mkdir()
    for path, message in {
        empty: "is empty",
        folder: "without images",
        tmp_path / "missing.txt": "cannot be read",
    }.items():
        with pytest.raises(CartError, match=message):
            inspect_models(models, base=base, inputs=[path])
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(CartError, match="3 models but 2 inputs"):
        inspect_models(models, inputs=[tmp_path / "a.txt"] * 2)


def test_a_model_without_tokenizer_is_named(models: list[Path], tmp_path: Path) -> None:
    bare = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in models]
    for folder in bare:
        for file in folder.glob("*token*"):
            file.unlink()
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(CartError, match="math has no tokenizer"):
        inspect_models(bare, inputs=[tmp_path / "a.txt"])
