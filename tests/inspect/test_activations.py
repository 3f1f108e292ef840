"""What weights are multiplied by: linear layers, GPT-2's, routers and stacked experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.inspect import inspect_models
from cart_plugin.inspect.activations import Examples, Subject, collect
from cart_plugin.inspect.merges import MERGED
from tests.adapters.lora import load, save_base, save_lora, state
from tests.inspect.conftest import save_tokenizer, tune

TEXT = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"


def save(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64)
    torch.manual_seed(0)
    return save(folder / "base", transformers.GPT2LMHeadModel(config))


def save_mixtral(folder: Path) -> Path:
    base = save_base(folder, "mixtral")
    save_tokenizer(base)
    return base


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    (tmp_path / "texts.txt").write_text(TEXT + "\n")
    return [tmp_path / "texts.txt"]


def records(found: Any) -> dict[str, Any]:
    return {record["tensor"]: record for record in found.records if record["decomposed"]}


def energies(found: Any, index: int) -> dict[str, float]:
    """By weight: the squared norm of what a model's difference answers on its inputs."""
    return {
        name: record["methods"]["average"]["measured"]["own"][index]
        for name, record in records(found).items()
    }


def seen(folder: Path, modules: Callable[[str, Any], bool]) -> dict[str, tuple[Tensor, ...]]:
    """What modules of a model get on the text."""
    model = load(folder)
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, module in model.named_modules():
        if modules(name, module):
            module.register_forward_pre_hook(lambda _, got, name=name: found.update({name: got}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        model(**tokenizer(TEXT, return_tensors="pt"))
    return found


def squared(value: Tensor) -> float:
    return float(value.double().square().sum())


def test_gpt2s_layers_are_measured_as_they_multiply(tmp_path: Path, texts: list[Path]) -> None:
    base = save_gpt2(tmp_path)
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        save_tokenizer(folder)
    found = inspect_models(models, base=base, merged=models[1], inputs=texts)
    start, own = (load_file(folder / "model.safetensors") for folder in (base, models[1]))
    heard = seen(models[1], lambda name, _: name.endswith(("c_attn", "c_fc", "c_proj")))
    assert len(heard) == 8
    for name, (inputs, *_) in heard.items():
        weight = f"{name}.weight"
        expected = squared(inputs @ (own[weight] - start[weight]))
        assert energies(found, 1)[weight] == pytest.approx(expected, rel=1e-3), name
        measured = records(found)[weight]["methods"][MERGED]["measured"]
        assert measured["lost"][1] == pytest.approx(0, abs=1e-6)
        assert measured["lost"][0] > 0.1
    assert not any("inputs" in note for note in found.notes), found.notes


def test_adapters_of_gpt2_are_measured_as_their_whole_models(
    tmp_path: Path, texts: list[Path]
) -> None:
    base = save_gpt2(tmp_path)
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [save_lora(tmp_path / f"a{seed}", base, seed, **config) for seed in range(2)]
    whole = []
    for folder in folders:
        whole.append(tune(base, tmp_path / f"whole-{folder.name}", 0))
        save_file(state(base, folder), whole[-1] / "model.safetensors", {"format": "pt"})
        save_tokenizer(whole[-1])
    expected = inspect_models(whole, base=base, inputs=texts)
    for written in (folders, [whole[0], folders[1]]):
        found = energies(inspect_models(written, base=base, inputs=texts), 1)
        for name, value in energies(expected, 1).items():
            if value > 1e-9:
                assert found[name] == pytest.approx(value, rel=5e-3), name


def test_experts_and_routers_are_measured_in_files_of_either_form(
    tmp_path: Path, texts: list[Path]
) -> None:
    base = save_mixtral(tmp_path)
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        save_tokenizer(folder)
    found = inspect_models(models, base=base, merged=models[1], inputs=texts)
    start, own = (load_file(folder / "model.safetensors") for folder in (base, models[1]))
    heard = seen(models[1], lambda name, _: name.endswith(".experts"))
    for name, (states, chosen, *_) in heard.items():
        layer = name.removesuffix(".mlp.experts")
        for expert in range(4):
            rows = states[(chosen == expert).any(dim=-1)]
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            gate, up = (rows @ own[f"{prefix}.{part}.weight"].mT for part in ("w1", "w3"))
            inner = torch.nn.functional.silu(gate) * up
            for part, inputs in {"w1": rows, "w3": rows, "w2": inner}.items():
                weight = f"{prefix}.{part}.weight"
                expected = squared(inputs @ (own[weight] - start[weight]).mT)
                assert energies(found, 1)[weight] == pytest.approx(expected, rel=1e-3), weight
    gates = [record for name, record in records(found).items() if "gate.weight" in name]
    assert len(gates) == 2
    assert all(record["reach"] == [1, 1] for record in gates)
    assert found.judgements("measured")[MERGED].lost[1] == pytest.approx(0, abs=1e-6)

    stacked = [
        save(tmp_path / f"stacked-{folder.name}", load(folder), save_original_format=False)
        for folder in (base, *models)
    ]
    other = inspect_models(stacked[1:], base=stacked[0], inputs=texts)
    sums = {
        name: sum(
            energies(found, 1)[f"{name}.block_sparse_moe.experts.{expert}.{part}.weight"]
            for expert in range(4)
            for part in parts
        )
        for name in ("model.layers.0", "model.layers.1")
        for parts in (("w1", "w3"),)
    }
    for name, expected in sums.items():
        joined = energies(other, 1)[f"{name}.mlp.experts.gate_up_proj"]
        assert joined == pytest.approx(expected, rel=1e-3)
        assert records(other)[f"{name}.mlp.experts.down_proj"]["reach"][1] > 0


@pytest.mark.parametrize("kind", ["GptOss", "Llama4Text"])
def test_experts_that_are_stored_turned_are_measured(
    kind: str, tmp_path: Path, texts: list[Path]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 1}
    others = {} if kind == "GptOss" else {"intermediate_size_mlp": 48, "moe_layers": [0]}
    config = getattr(transformers, f"{kind}Config")(**sizes, **others)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    base = save(tmp_path / "base", model(config))
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        save_tokenizer(folder)
    found = inspect_models(models, base=base, merged=models[1], inputs=texts)
    experts = {name: one for name, one in records(found).items() if name.endswith("_proj")}
    assert len(experts) == 2
    for name, record in experts.items():
        assert record["reach"][1] > 0, (name, found.notes)
        assert record["methods"][MERGED]["measured"]["lost"][1] == pytest.approx(0, abs=1e-6)
        assert record["methods"][MERGED]["measured"]["lost"][0] > 0.1
    start, own = (load_file(folder / "model.safetensors") for folder in (base, models[1]))
    heard = seen(models[1], lambda name, _: name.endswith(".experts"))
    (states, *chosen), (name,) = next(iter(heard.values())), list(heard)
    weight = f"{name}.gate_up_proj"
    delta = own[weight] - start[weight]
    if kind == "GptOss":
        rows = [states[(chosen[0] == expert).any(dim=-1)] for expert in range(4)]
    else:
        rows = list(states.reshape(4, -1, 32))
    expected = sum(squared(rows[expert] @ delta[expert]) for expert in range(4))
    assert energies(found, 1)[weight] == pytest.approx(expected, rel=1e-3)


def test_what_is_not_measured_is_named(tmp_path: Path, texts: list[Path]) -> None:
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4, time_step_rank=4
    )
    torch.manual_seed(0)
    base = save(tmp_path / "base", transformers.MambaForCausalLM(config))
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        save_tokenizer(folder)
    notes = inspect_models(models, base=base, inputs=texts, out=tmp_path / "out").notes
    (note,) = [note for note in notes if note.startswith("not measured on the inputs")]
    # A convolution, and a linear layer whose weight is taken past the layer.
    assert "4 of 10 weights" in note
    assert "layers.0.mixer.conv1d.weight, backbone.layers.0.mixer.dt_proj.weight" in note
    assert note in (tmp_path / "out" / "report.md").read_text()
    # As well where the records are of a run before.
    assert note in inspect_models(models, base=base, inputs=texts, out=tmp_path / "out").notes
    assert not any("inputs" in note for note in inspect_models(models, base=base).notes)


def test_experts_that_no_example_reaches_are_named(tmp_path: Path) -> None:
    base = save_mixtral(tmp_path)
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        save_tokenizer(folder)
    (tmp_path / "one.txt").write_text("1\n")
    found = inspect_models(models, base=base, inputs=[tmp_path / "one.txt"])
    assert any(note.startswith("measured on the inputs in part") for note in found.notes)


def test_every_example_of_many_is_measured_and_every_use_of_a_shared_layer(
    tmp_path: Path,
) -> None:
    config = transformers.AlbertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        vocab_size=64,
        embedding_size=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    folder = save(tmp_path / "albert", transformers.AlbertForMaskedLM(config))
    lines = [f"{number} {number + 1} {number + 2} 4 5 6 7 8" for number in range(50)]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    examples = Examples.read(tmp_path / "many.txt")
    subject = Subject("albert", folder, None, False, [folder])
    counts: list[int] = []
    found = collect(subject, examples, tmp_path / "kept.safetensors", lambda *_: None)
    heard: dict[tuple[float, ...], int] = {}
    model = load(folder, transformers.AutoModelForMaskedLM)
    (name,) = [name for name in found.held.tensors if name.endswith("attention.query.weight")]
    module = model.get_submodule(name.removesuffix(".weight"))

    def note(_: Any, got: tuple[Tensor, ...]) -> None:
        for row in got[0].reshape(-1, 32):
            heard.setdefault(tuple(row.tolist()), len(counts))

    module.register_forward_pre_hook(note)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for text in examples.texts:
            model(**tokenizer(text, return_tensors="pt"))
            counts.append(0)
    rows = found.held.read(name)
    assert len(rows) == 256
    known = torch.tensor(list(heard))
    nearest = torch.cdist(rows, known).argmin(dim=1)
    of = [list(heard.values())[int(index)] for index in nearest]
    assert len(set(of)) > 40
    assert {of[0] < 5, of[-1] >= 45} == {True}


def test_a_model_that_lacks_layers_of_its_class_is_not_run(
    tmp_path: Path, texts: list[Path]
) -> None:
    base = save_base(tmp_path, num_hidden_layers=1)
    save_tokenizer(base)
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for folder in models:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CartError, match=r"m0 lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        inspect_models(models, inputs=texts)


def test_another_text_tokenizer_config_base_or_merged_model_is_measured_anew(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cart_plugin.inspect import run

    base = save_base(tmp_path, num_hidden_layers=1)
    save_tokenizer(base)
    models = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    given: dict[str, Any] = {"base": base, "inputs": texts, "out": tmp_path / "out"}
    measured: list[str] = []
    whole = run.record
    monkeypatch.setattr(
        run, "record", lambda weight, *rest: (measured.append(weight.name), whole(weight, *rest))[1]
    )

    def is_measured() -> bool:
        measured.clear()
        inspect_models(models, **given)
        return bool(measured)

    def rewrite(file: Path, old: str, new: str) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    assert is_measured()
    assert not is_measured()
    rewrite(texts[0], "1 2", "2 1")
    assert is_measured()
    rewrite(models[1] / "tokenizer.json", '"7": 8', '"7": 9')
    assert is_measured()
    rewrite(models[0] / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    assert is_measured()
    given["merged"] = models[0]
    assert is_measured()
    given["base"] = tune(base, tmp_path / "other", 9)
    assert is_measured()
    monkeypatch.setattr(run, "version", lambda _: "0")
    assert is_measured()
    assert not is_measured()
