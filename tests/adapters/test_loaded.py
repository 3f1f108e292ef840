"""Adapters of a loaded model become a new one of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from cart_plugin import CartError
from cart_plugin.adapters import merge_adapters, merge_loaded
from tests.adapters.lora import load, save_base, save_loras
from tests.adapters.test_output import answer
from tests.adapters.test_whole_models import EXPERTS


def loaded(base: Path, adapters: Sequence[Path]) -> Any:
    model = peft.PeftModel.from_pretrained(
        load(base), str(adapters[0]), adapter_name=adapters[0].name
    )
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter), adapter_name=adapter.name)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": "full"}, {"method": "cart", "keep": 2, "lambda_": 1.5}, {"method": "linear"}],
)
def test_it_is_what_the_folders_give(
    options: dict[str, Any], base: Path, trio: list[Path], tmp_path: Path
) -> None:
    weights = [2.0, 1.0, 1.0]
    model = loaded(base, trio)
    report = merge_loaded(model, ["math", "code", "german"], "all", weights=weights, **options)
    merge_adapters(trio, tmp_path / "out", weights=weights, **options)
    assert model.active_adapters == ["math"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".all." in n)
    before = answer(model)
    model.set_adapter("all")
    found = answer(model)
    folder = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    assert torch.allclose(found, answer(folder), atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    assert report.bytes == sum(p.nbytes for n, p in model.named_parameters() if ".all." in n)
    assert list(report.paths) == ["math", "code", "german"]


def test_what_is_no_peft_model_or_no_list(base: Path, trio: list[Path]) -> None:
    model = load(base)
    with pytest.raises(CartError, match="must be a PeftModel, got LlamaForCausalLM; load"):
        merge_loaded(model, ["math", "code"])
    model.load_adapter(str(trio[0]), adapter_name="math")  # transformers' own door
    with pytest.raises(CartError, match="must be a PeftModel, got LlamaForCausalLM; load"):
        merge_loaded(model, ["math"])
    with pytest.raises(CartError, match="adapters must be a list, got 'math' by itself"):
        merge_loaded(loaded(base, trio), "math")


def test_the_new_one_is_saved_and_loaded_like_any(
    base: Path, trio: list[Path], tmp_path: Path
) -> None:
    model = loaded(base, trio)
    merge_loaded(model, ["math", "code"])
    model.set_adapter("merged")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "merged"))
    assert torch.allclose(answer(again), answer(model), atol=1e-6)


def test_adapters_of_several_kinds(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen2", num_hidden_layers=2)
    configs = [
        {"r": 6, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["down_proj"], "lora_bias": False},
    ]
    adapters = save_loras(tmp_path, base, configs)
    model = loaded(base, adapters)
    merge_loaded(model, [one.name for one in adapters], rank="full")
    model.set_adapter("merged")
    merge_adapters(adapters, tmp_path / "out", rank="full")
    folder = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    assert torch.allclose(answer(model), answer(folder), atol=1e-5)


def test_stacked_experts(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen3-moe")
    adapters = save_loras(tmp_path, base, [{}, {}], target_parameters=EXPERTS)
    model = loaded(base, adapters)
    merge_loaded(model, ["math", "code"], rank="full")
    model.set_adapter("merged")
    merge_adapters(adapters, tmp_path / "out", rank="full")
    folder = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    assert torch.allclose(answer(model), answer(folder), atol=1e-5)


def test_a_bfloat16_model(base: Path, trio: list[Path]) -> None:
    model = peft.PeftModel.from_pretrained(
        load(base).bfloat16(), str(trio[0]), adapter_name="math", autocast_adapter_dtype=False
    )
    model.load_adapter(str(trio[1]), adapter_name="code", autocast_adapter_dtype=False)
    merge_loaded(model, ["math", "code"])
    dtypes = {p.dtype for name, p in model.named_parameters() if ".merged." in name}
    assert dtypes == {torch.bfloat16}


def test_adapters_in_float32_beside_a_bfloat16_base(base: Path, trio: list[Path]) -> None:
    """As PEFT loads them; their merge is rounded no more than they are."""
    model = peft.PeftModel.from_pretrained(load(base).bfloat16(), str(trio[0]), adapter_name="math")
    model.load_adapter(str(trio[1]), adapter_name="code")
    report = merge_loaded(model, ["math", "code"])
    held = [p for name, p in model.named_parameters() if ".merged." in name]
    assert {p.dtype for p in held} == {torch.float32}
    assert report.bytes == sum(p.nbytes for p in held)


def test_of_patterns_the_first_that_fits_counts(base: Path) -> None:
    """As PEFT made the model; in a file they would be sorted."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["v_proj"],
        alpha_pattern={"v_proj": 16, r"layers\.1\.self_attn\.v_proj": 2},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(load(base), config, adapter_name="one")
    model.add_adapter("two", config)
    merge_loaded(model, ["one", "two"], method="linear", rank="full")
    for layer in (0, 1):
        module = model.get_base_model().get_submodule(f"model.layers.{layer}.self_attn.v_proj")
        expected = (module.get_delta_weight("one") + module.get_delta_weight("two")) / 2
        assert torch.allclose(module.get_delta_weight("merged"), expected, atol=1e-6)


def test_adapters_count_as_the_model_scales_them(base: Path, trio: list[Path]) -> None:
    model = loaded(base, trio[:2])
    module = model.get_base_model().get_submodule("model.layers.0.self_attn.v_proj")
    module.scale_layer(3.0)  # of the active one
    merge_loaded(model, ["math", "code"], method="linear", rank="full")
    expected = (module.get_delta_weight("math") + module.get_delta_weight("code")) / 2
    assert torch.allclose(module.get_delta_weight("merged"), expected, atol=1e-6)
    assert module.scaling == {"math": 6.0, "code": 2.0, "merged": 1.0}


def test_an_adapter_that_is_called_as_a_module(base: Path, tmp_path: Path) -> None:
    """PEFT then leaves that module out of the other adapters, without a word."""
    math, code = save_loras(tmp_path, base, [{}, {}], target_modules=["q_proj", "up_proj"])
    model = loaded(base, [math, code.rename(tmp_path / "mlp")])
    with pytest.raises(CartError, match=r"mlp\.up_proj for another adapter's and not for math's"):
        merge_loaded(model, ["math", "mlp"])
    assert set(model.peft_config) == {"math", "mlp"}


@pytest.mark.parametrize(
    ("adapters", "name", "parts"),
    [
        (["math", "other"], "new", ("no adapter 'other'", "it has math, code")),
        (["math", "code"], "code", ("otherwise than 'code'",)),
        (["math", "code"], "a.b", ("otherwise than 'a.b'", "without dots")),
        (["math", "code"], "mlp", ("otherwise than 'mlp'", "no part of its modules' names")),
        (["math", "math"], "new", ("two adapters are called 'math'",)),
        ([], "new", ("at least one adapter",)),
    ],
)
def test_names_that_do_not_fit(
    adapters: list[str], name: str, parts: tuple[str, ...], base: Path, trio: list[Path]
) -> None:
    model = loaded(base, trio[:2])
    with pytest.raises(CartError) as caught:
        merge_loaded(model, adapters, name)
    for part in parts:
        assert part in str(caught.value)
    assert set(model.peft_config) == {"math", "code"}


def test_what_peft_does_not_hold_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen2", num_hidden_layers=2)
    adapters = save_loras(tmp_path, base, [{}], bias="all")
    model = loaded(base, adapters)
    before = answer(model)
    with pytest.raises(CartError, match=r"PEFT does not hold .* merge the adapters' folders"):
        merge_loaded(model, ["math"], "new")
    assert set(model.peft_config) == {"math"}
    assert model.active_adapters == ["math"]
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize(
    ("error", "expected"), [(RuntimeError("full"), CartError), (KeyboardInterrupt(), None)]
)
def test_an_end_half_way_leaves_the_model_as_it_was(
    error: BaseException,
    expected: type[BaseException] | None,
    base: Path,
    trio: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT 0.21.2 leaves the layers that it has made, and no config by which to delete them."""
    model = loaded(base, trio[:2])
    before, said = list(model.state_dict()), answer(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    add, calls = LoraLayer.update_layer, itertools.count()

    def fails(*args: Any, **options: Any) -> None:
        if next(calls) == 2:
            raise error
        add(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayer, "update_layer", fails)
        with pytest.raises(expected or type(error)):
            merge_loaded(model, ["math", "code"])
    assert next(calls) > 2
    assert list(model.state_dict()) == before
    assert set(model.peft_config) == {"math", "code"}
    assert model.active_adapters == ["math"]
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(answer(model), said)
    merge_loaded(model, ["math", "code"])
    assert "merged" in model.peft_config


def test_what_cannot_be_read_of_a_loaded_model(base: Path, trio: list[Path]) -> None:
    model = loaded(base, trio)
    with pytest.raises(CartError, match="adapters must be a list"):
        merge_loaded(model, 3)  # type: ignore[arg-type]
    with pytest.raises(CartError, match="otherwise than 5"):
        merge_loaded(model, ["math", "code"], 5)  # type: ignore[arg-type]
    model.to("meta")
    with pytest.raises(CartError, match=r"offloaded \(on the meta device\); merge the"):
        merge_loaded(model, ["math", "code"])
    assert "merged" not in model.peft_config
    model = loaded(base, trio)
    model.unload()
    with pytest.raises(CartError, match="has been unloaded or merged: load the adapters again"):
        merge_loaded(model, ["math", "code"])


def test_experts_that_peft_stacks_are_merged_from_their_folders(tmp_path: Path) -> None:
    """Trained one by one, as by transformers 4: PEFT rewrites the config on loading."""
    base = save_base(tmp_path, "mixtral", num_hidden_layers=1)
    adapters = save_loras(tmp_path, base, [{}, {}], target_modules=["q_proj"])
    model = loaded(base, adapters)
    model.peft_config["code"].target_parameters = {"gate_up_proj"}
    with pytest.raises(CartError, match=r"name no modules, .* merge the adapters' folders"):
        merge_loaded(model, ["math", "code"])


def test_adapters_and_weights_of_any_kind(base: Path, trio: list[Path]) -> None:
    expected = merge_loaded(loaded(base, trio), ["math", "code"], weights=[2, 1]).document()
    for weights in (np.array([2.0, 1.0]), torch.tensor([2, 1]), [np.float32(2), Fraction(1)]):
        report = merge_loaded(loaded(base, trio), iter(["math", "code"]), weights=weights)
        assert {**report.document(), "seconds": 0} == {**expected, "seconds": 0}
