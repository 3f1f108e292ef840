"""What doctor says about inputs that are a model and a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.doctor.conftest import Report
from tests.doctor.tiny import save_model

CACHE = "mergekit stops at once without --lora-merge-cache"


def save_adapter(folder: Path, base: str, tokens: int | None = None, **config: Any) -> str:
    """Save an untrained adapter of a model; its folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], **config}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapters(llamas: list[str], tmp_path: Path) -> list[str]:
    """Three LoRA adapters of the first Llama model."""
    return [save_adapter(tmp_path / f"lora-{number}", llamas[0]) for number in range(3)]


@pytest.fixture
def put(check: Callable[..., Report], llamas: list[str]) -> Callable[..., Report]:
    """Doctor on a merge of two models and an adapter that is put on the first."""

    def put(adapter: str, model: str = "", **recipe: Any) -> Report:
        return check([f"{model or llamas[0]}+{adapter}", *llamas[1:]], **recipe)

    return put


def merge(models: list[str], out: Path, cache: Path | None) -> None:
    """Merge them with mergekit itself."""
    config = {"merge_method": "cart", "models": [{"model": model} for model in models]}
    options = MergeOptions(
        quiet=True,
        copy_tokenizer=False,
        write_model_card=False,
        lora_merge_cache=None if cache is None else str(cache),
    )
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def test_the_cache_that_mergekit_needs(
    check: Callable[..., Report], llamas: list[str], adapters: list[str], tmp_path: Path
) -> None:
    models = [f"{llamas[0]}+{adapter}" for adapter in adapters]
    report = check(models)
    report.has_only_warning(f"3 inputs with LoRA ({models[0]} and 2 more): {CACHE}", "FOLDER")
    assert "35 decomposed" in report.text
    assert "disk needed by --lora-merge-cache FOLDER: 606 KB" in report.text
    # and so it is
    with pytest.raises(RuntimeError, match="Need to specify cache dir"):
        merge(models, tmp_path / "out", None)
    merge(models, tmp_path / "out", tmp_path / "cache")


def test_adapter_that_is_missing(put: Callable[..., Report]) -> None:
    put("/no/such/adapter").has_only_problem("adapter /no/such/adapter does not exist")


def test_adapter_that_is_no_adapter(put: Callable[..., Report], llamas: list[str]) -> None:
    put(llamas[1]).has_only_problem("has no adapter_config.json", "PEFT")


def test_adapter_in_place_of_a_model(
    check: Callable[..., Report], llamas: list[str], adapters: list[str]
) -> None:
    report = check([*llamas, adapters[0]])
    report.has_only_problem("is a LoRA adapter without its model", f"BASE_MODEL+{adapters[0]}")


def test_adapter_without_weights(put: Callable[..., Report], adapters: list[str]) -> None:
    (Path(adapters[0]) / "adapter_model.safetensors").unlink()
    report = put(adapters[0])
    report.has_only_problem(f"adapter {adapters[0]}: adapter_model.safetensors is missing")


def test_adapter_that_is_pickled(put: Callable[..., Report], adapters: list[str]) -> None:
    file = Path(adapters[0]) / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()
    put(adapters[0]).has_only_warning(CACHE)


def test_adapter_of_another_shape(
    put: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, head_dim=16))
    adapter = save_adapter(tmp_path / "lora", other)
    report = put(adapter)
    report.has_only_problem(
        f"adapter {adapter} does not fit model {llamas[0]}",
        "q_proj.weight is (64, 32) in it and (32, 32) there",
        "name the model that the adapter was trained on",
    )
    models, cache = [f"{llamas[0]}+{adapter}", *llamas[1:]], tmp_path / "cache"
    with pytest.raises(RuntimeError, match="size mismatch"):
        merge(models, tmp_path / "out", cache)
    with pytest.raises(RuntimeError, match="Unable to find model files"):  # the trap it leaves
        merge(models, tmp_path / "out", cache)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_adapter_with_new_tokens(
    config: dict[str, Any], put: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "lora", llamas[0], tokens=70, **config)
    report = put(adapter)
    report.has_only_problem("with new tokens", "has 70 rows in it", "resize_token_embeddings(70)")


@pytest.mark.parametrize("layers", [8, 5])
def test_adapter_of_a_deeper_model(
    layers: int, put: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    other = str(save_model(tmp_path / "other", "llama", 9, num_hidden_layers=layers))
    report = put(save_adapter(tmp_path / "lora", other))
    if layers > 5:
        report.has_only_problem("changes 6 weights that model", "layers.5.", "PEFT leaves them out")
    else:
        assert any("was trained on" in warning for warning in report.warnings)


def test_adapter_of_another_base_of_the_same_shape(
    put: Callable[..., Report], llamas: list[str], adapters: list[str], tmp_path: Path
) -> None:
    report = put(save_adapter(tmp_path / "lora", llamas[1]))
    assert report.problems == []
    assert len(report.warnings) == 2
    assert f"was trained on {llamas[1]} and is put on {llamas[0]}" in report.warnings[0]

    def trained_on(name: str | None) -> int:
        file = Path(adapters[0]) / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return len(put(adapters[0]).warnings)

    alike = ["", None, llamas[0] + "/", f"somebody/{Path(llamas[0]).name}"]
    assert [trained_on(name) for name in alike] == [1, 1, 1, 1]
    assert trained_on("somebody/else") == 2


def test_parts_of_other_kinds_of_adapters(
    put: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    for number, config in enumerate(
        (
            {"use_dora": True},
            {"bias": "lora_only"},
            {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
            {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 3}},
        )
    ):
        put(save_adapter(tmp_path / f"{number}", llamas[0], **config)).has_only_warning(CACHE)


def test_models_whose_files_use_other_names(
    saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    from cart_plugin.doctor.adapters import check_fit
    from cart_plugin.doctor.inputs import read_folder

    model = saved("vit")[0]
    checkpoint, _ = read_folder(model, Path(model))
    names = {name.rpartition(".")[0] for name in checkpoint.tensors}
    tuned = peft.get_peft_model(
        AutoModel.from_pretrained(model), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    tuned.save_pretrained(tmp_path / "lora")
    assert not {name for name, _ in tuned.base_model.model.named_modules()} <= names
    assert check_fit(tmp_path / "lora", "lora", checkpoint) == []


def test_lora_on_an_inferred_architecture(
    check: Callable[..., Report], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    models = saved("dinov2", original_format=False)
    tuned = AutoModel.from_pretrained(models[0])
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.get_peft_model(tuned, config).save_pretrained(tmp_path / "lora")
    report = check([*models[1:], f"{models[0]}+{tmp_path / 'lora'}"])
    report.has_only_problem("cannot plan", "fuse the adapters first")


# Rank rules that keep adapters whole

WHOLE = "decomposed tensors that they change: whole differences from the average"


def adapters_of(folder: Path, base: str, **config: Any) -> list[str]:
    """Three inputs that are a model and an adapter of it, of rank 4 and more."""
    made = []
    for number in range(3):
        torch.manual_seed(number)
        settings = {"r": 4, "init_lora_weights": False, **config}
        made.append(f"{base}+{save_adapter(folder / f'own-{number}', base, **settings)}")
    return made


def said(report: Report) -> list[str]:
    """The warnings but that of the cache."""
    assert report.problems == []
    return [text for text in report.warnings if CACHE not in text]


@pytest.mark.parametrize("rule", [{"rank": 12}, {"rank_ratio": 0.8}, {"energy": 0.995}])
def test_a_rule_that_keeps_adapters_whole(
    rule: dict[str, Any], check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = adapters_of(tmp_path, llamas[0])
    (text,) = said(check(models, parameters=rule))
    ((name, value),) = rule.items()
    assert f"{name} {value:g} keeps adapters of rank 4 whole in 10 of the 10 {WHOLE}" in text
    assert "delete the rank rule" in text
    assert "set rank: 2, half of the adapters'; or set merge_method: cart_auto" in text


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"parameters": {"rank": 11}},
        {"parameters": {"energy": 0.9}},
        {"parameters": {"rank_ratio": 0}},
        {"merge_method": "cart_auto", "parameters": {"rank": 12}},
        {"parameters": {"rank": [{"filter": "v_proj", "value": 12}, {"value": 2}]}},
    ],
    ids=repr,
)
def test_rules_that_leave_something_of_adapters_out(
    recipe: dict[str, Any], check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = adapters_of(tmp_path, llamas[0])
    assert not any(WHOLE in text for text in said(check(models, **recipe)))


def test_other_centres_and_other_models_are_no_average(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = adapters_of(tmp_path, llamas[0])
    rule = {"rank": 12}
    around_base = {"base_model": llamas[0], "parameters": {**rule, "center": "base"}}
    assert not any(WHOLE in text for text in said(check(models, **around_base)))
    # A model that is whole, or an adapter of another model, differs by more than a rank of 12.
    whole = [*models[:2], llamas[1]]
    others = [*models[:2], f"{llamas[1]}+{models[2].partition('+')[2]}"]
    for mixed in (whole, others):
        assert not any(WHOLE in text for text in said(check(mixed, parameters=rule)))


@pytest.mark.parametrize(("rank", "told"), [(15, False), (18, True)])
def test_ranks_of_single_layers_count(
    rank: int, told: bool, check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = adapters_of(
        tmp_path, llamas[0], rank_pattern={"q_proj": 6, "layers.1.self_attn.v_proj": 1}
    )
    texts = said(check(models, parameters={"rank": rank}))
    assert any(WHOLE in text for text in texts) == told  # at 15 it is those of v_proj, a half
    if told:
        assert "keeps adapters of rank 1 to 6 whole in 10 of the 10" in texts[0]


def test_of_dora_nothing_is_known(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = adapters_of(tmp_path, llamas[0], use_dora=True)
    assert not any(WHOLE in text for text in said(check(models, parameters={"rank": 12})))
