"""What `cart_auto` learns from the models' files: where inputs lie, and a base that is rounded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cart_plugin import CartSettings, CartWarning, merge_state_dicts, merge_tensors
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.stored import Stored
from cart_plugin.inspect import turned_parameters
from tests.doctor.tiny import write_recipe
from tests.inspect.conftest import tune
from tests.inspect.test_activations import save_gpt2
from tests.mergekit.helpers import KEY, load_tensors, run
from tests.support import random

AUTO = CartSettings(lambda_="auto")
FIRST, THIRD = (f"transformer.h.{layer}.mlp.c_fc.weight" for layer in (0, 2))


def tuned(base: Path, folder: Path, count: int = 3) -> list[str]:
    return [str(tune(base, folder / f"tuned-{seed}", seed)) for seed in range(count)]


def test_gpt2_is_merged_by_the_inputs_of_its_weights(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path)
    models = tuned(base, tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method="cart_auto", base_model=str(base)
    )
    merged = run(recipe, tmp_path / "out")
    turned = turned_parameters(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert FIRST in turned
    states = [load_tensors(model) for model in models]
    start = load_tensors(str(base))
    expected = merge_state_dicts(states, AUTO, base=start, turned=turned)
    as_stored = merge_state_dicts(states, AUTO, base=start)
    for name in turned & merged.keys():
        assert torch.equal(merged[name], expected[name]), name
        assert not torch.allclose(merged[name], as_stored[name], atol=1e-4), name


def test_layers_from_elsewhere_lie_as_theirs_do(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path)
    models = tuned(base, tmp_path)
    slices = [
        {"sources": [{"model": model, "layer_range": part} for model in (*models, str(base))]}
        for part in ([0, 2], [0, 1])
    ]
    recipe = write_recipe(
        tmp_path / "r.yaml",
        [],
        models=None,
        slices=slices,
        merge_method="cart_auto",
        base_model=str(base),
    )
    merged = run(recipe, tmp_path / "out")
    first = [load_tensors(model)[FIRST] for model in models]
    start = load_tensors(str(base))[FIRST]
    expected = merge_tensors(first, AUTO, base=start, name=THIRD, turned=True)
    assert torch.equal(merged[THIRD], expected)


def test_models_that_mergekit_does_not_know_are_merged_alike(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cart_plugin.cli import main

    config = transformers.OpenAIGPTConfig(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64
    )
    torch.manual_seed(0)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "base")
    models = tuned(tmp_path / "base", tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method="cart_auto", base_model=str(tmp_path / "base")
    )
    result = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    merged, start = (load_tensors(str(tmp_path / name)) for name in ("out", "base"))
    own = [load_tensors(model)[FIRST] for model in models]
    expected = merge_tensors(own, AUTO, base=start[FIRST], name=FIRST, turned=True)
    assert torch.equal(merged[FIRST], expected)


def test_of_models_that_transformers_does_not_know_it_says_what_it_takes_them_for() -> None:
    stored = Stored()
    info = TensorInfo((8, 4), torch.float32)
    stored.add({"a": Checkpoint("a", Path("a"), {"model_type": "odd"}, {FIRST: info})})
    with pytest.warns(CartWarning, match=r"taken to be stored as \(outputs, inputs\)"):
        assert not stored.is_turned(FIRST, (8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert not stored.is_turned(FIRST, (8, 4))
        assert not stored.is_turned("model.layers.0.mlp.up_proj.weight", (8, 4))


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_base_that_the_recipe_rounds_has_rounding_errors_of_its_own(
    dtype: str | None, llamas: list[str], tmp_path: Path
) -> None:
    llama = llamas[0]
    name = KEY.format(0)
    start = load_file(Path(llama) / "model.safetensors")
    models = []
    for seed in range(3):
        tensors = {key: tensor.clone() for key, tensor in start.items()}
        m, n = tensors[name].shape
        tau = random(m, 2, seed=seed) @ random(2, n, seed=10 + seed)
        tensors[name] += 0.05 * tensors[name].norm() / tau.norm() * tau
        models.append(str(copied(llama, tmp_path / f"m{seed}", tensors)))
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method="cart_auto", base_model=llama, **options
    )
    merged = run(recipe, tmp_path / "out")[name]
    kind = torch.bfloat16 if dtype else torch.float32
    own = [load_tensors(model)[name].to(kind) for model in models]
    found = {
        rounded: merge_tensors(
            own, AUTO, base=start[name].to(kind), name=name, base_is_rounded=rounded
        )
        for rounded in (True, False)
    }
    assert torch.equal(merged, found[dtype is not None])
    assert torch.equal(found[True], found[False]) == (dtype is None)


def copied(model: str, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_a_dtype_rounds_is_told_by_its_bits() -> None:
    stored = Stored()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = {KEY.format(0): TensorInfo((8, 4), dtype)}
        stored.add({dtype: Checkpoint(str(dtype), Path("a"), {}, tensors)})
    rounded = {
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    }
    for one in (torch.float32, torch.bfloat16, torch.float16):
        for other in (torch.float32, torch.bfloat16, torch.float16):
            for name in (KEY.format(0), "by.another.name"):
                assert stored.is_finer(one, name, other) == ((one, other) in rounded)
    assert not stored.is_finer("unknown", KEY.format(0), torch.bfloat16)
