"""Whole models and adapters from the disk: what is read, left out, refused, and gone on with."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cart_plugin import CartError, merge_state_dicts
from cart_plugin.adapters import merge_adapters
from cart_plugin.inspect import inspect_models, inspect_state_dicts
from cart_plugin.inspect.merges import MERGED
from tests.adapters.lora import save_base, save_loras, state
from tests.inspect.conftest import NAMES, break_tensor, numbers, report, tune

DOWN = "model.layers.1.mlp.down_proj.weight"


def kept(found: Any) -> dict[str, list[float]]:
    return {method: list(judged.kept) for method, judged in found.judgements().items()}


@pytest.fixture
def own(models: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may break."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in models]


def test_every_weight_has_a_record_and_every_number_is_finite(
    models: list[Path], base: Path, tmp_path: Path
) -> None:
    inspect_models(models, base=base, out=tmp_path / "out")
    found = report(tmp_path / "out")
    held = load_file(models[0] / "model.safetensors")
    assert [record["tensor"] for record in found["records"]] == sorted(held)
    assert all(map(math.isfinite, numbers(found)))
    assert {entry["model"] for entry in found["movements"]} == set(NAMES)


def test_state_dicts_in_memory_say_what_the_files_say(models: list[Path], base: Path) -> None:
    dicts = {folder.name: load_file(folder / "model.safetensors") for folder in models}
    rows = inspect_state_dicts(dicts, base=load_file(base / "model.safetensors"))
    expected = inspect_models(models, base=base).rows()
    order = lambda row: (row["tensor"], row["model"])  # noqa: E731
    assert sorted(rows, key=order) == sorted(expected, key=order)
    assert {row["model"] for row in rows} == set(NAMES)
    assert {type(value) for row in rows for value in row.values()} <= {
        *(str, int, float),
        type(None),
    }


def test_state_dicts_that_lack_tensors_are_refused(models: list[Path]) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in models[:2])
    del second[DOWN]
    with pytest.raises(CartError, match=f"lacks 1 tensor .*{DOWN}"):
        inspect_state_dicts([first, second])
    with pytest.raises(CartError, match="two models or more, got 1"):
        inspect_state_dicts([first])


def test_adapters_say_what_the_models_say_that_they_make(
    adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    for folder in adapters:
        place = tmp_path / folder.name
        place.mkdir()
        shutil.copy(base / "config.json", place)
        save_file(state(base, folder), place / "model.safetensors", {"format": "pt"})
    whole = inspect_models([tmp_path / name for name in NAMES], base=base)
    found = inspect_models([f"{base}+{folder}" for folder in adapters])
    for method, values in kept(whole).items():
        assert kept(found)[method] == pytest.approx(values, rel=2e-3), method
    assert [movement.rank for movement in found.movements()] == [4, 4, 4]
    moved = [movement.moved for movement in whole.movements()]
    assert [movement.moved for movement in found.movements()] == pytest.approx(moved, rel=1e-4)
    assert all(movement.share is not None for movement in found.movements())


def test_adapters_alone_need_no_base_on_the_disk(adapters: list[Path], base: Path) -> None:
    alone, with_base = inspect_models(adapters), inspect_models(adapters, base=base)
    assert kept(alone) == kept(with_base)
    assert alone.movements()[0].share is None


def test_a_merged_model_is_judged_by_what_it_is(
    models: list[Path], base: Path, tmp_path: Path
) -> None:
    dicts = [load_file(folder / "model.safetensors") for folder in models]
    shutil.copytree(base, tmp_path / "merged")
    merged = merge_state_dicts(dicts)
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    found = kept(inspect_models(models, base=base, merged=tmp_path / "merged"))
    assert found[MERGED] == pytest.approx(found["cart"], rel=1e-3)
    assert found[MERGED] != pytest.approx(found["average"], rel=1e-2)


def test_a_merged_adapter_is_judged_by_what_it_is(adapters: list[Path], tmp_path: Path) -> None:
    merge_adapters(adapters, tmp_path / "merged", method="linear", rank="full")
    found = kept(inspect_models(adapters, merged=tmp_path / "merged"))
    assert found[MERGED] == pytest.approx(found["average"], rel=1e-3)


def test_shards_are_read_as_one_model(models: list[Path], base: Path, tmp_path: Path) -> None:
    tensors = load_file(models[0] / "model.safetensors")
    folder = Path(shutil.copytree(models[0], tmp_path / "math"))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = inspect_models([folder, *models[1:]], base=base)
    assert sharded.rows() == inspect_models(models, base=base).rows()


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(
    models: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cart_plugin.inspect import run

    out, whole = tmp_path / "out", run.record
    measured: list[str] = []

    def dying(weight: Any, *arguments: Any) -> Any:
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(weight.name)
        return whole(weight, *arguments)

    monkeypatch.setattr(run, "record", dying)
    with pytest.raises(KeyboardInterrupt):
        inspect_models(models, base=base, out=out)
    assert not (out / "report.json").exists()
    with (out / ".measured.jsonl").open("a") as file:
        file.write('{"tensor": "model.half')  # a line that was cut off, too
    monkeypatch.setattr(
        run, "record", lambda weight, *rest: (measured.append(weight.name), whole(weight, *rest))[1]
    )
    found = inspect_models(models, base=base, out=out)
    assert len(measured) == len(set(measured)) == len(found.records)
    assert found.rows() == inspect_models(models, base=base).rows()
    assert not (out / ".measured.jsonl").exists()


def test_weights_side_by_side_say_what_they_say_one_after_the_other(
    models: list[Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cart_plugin.inspect import run

    working: set[int] = set()
    whole = run.record
    monkeypatch.setattr(
        run, "record", lambda *given: (working.add(threading.get_ident()), whole(*given))[1]
    )
    alone = inspect_models(models, base=base).records
    assert working == {threading.get_ident()}
    working.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert inspect_models(models, base=base).records == alone
        assert threading.get_ident() not in working
        working.clear()
        largest = max(math.prod(record["shape"]) for record in alone)
        monkeypatch.setattr(run, "_AT_ONCE", 2 * 3 * largest)
        inspect_models(models)
        assert threading.get_ident() not in working
        inspect_models(models, base=base)  # which is read, too
        assert threading.get_ident() in working
    finally:
        torch.set_num_threads(threads)
    working.clear()
    monkeypatch.setattr(run, "_AT_ONCE", 1)  # all of them are large
    inspect_models(models, base=base)
    assert working == {threading.get_ident()}


def test_other_models_are_measured_anew(
    own: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cart_plugin.inspect import run

    out = tmp_path / "out"
    before = inspect_models(own, base=base, out=out).rows()
    whole = run.record
    measured: list[str] = []
    monkeypatch.setattr(
        run, "record", lambda weight, *rest: (measured.append(weight.name), whole(weight, *rest))[1]
    )
    assert inspect_models(own, base=base, out=out).rows() == before
    assert measured == []
    shutil.rmtree(own[2])
    tune(base, own[2], seed=9)
    after = inspect_models(own, base=base, out=out)
    assert len(measured) == len(after.records)
    assert after.rows() != before


def test_another_programs_report_is_not_written_over(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"adapters": {}}')
    with pytest.raises(CartError, match="another program's"):
        inspect_models(models, out=tmp_path)
    assert (tmp_path / "report.json").read_text() == '{"adapters": {}}'
    (tmp_path / "file").write_text("")
    with pytest.raises(CartError, match="is a file"):
        inspect_models(models, out=tmp_path / "file")


def test_one_model_is_no_comparison(models: list[Path]) -> None:
    with pytest.raises(CartError, match="two models or more, got 1"):
        inspect_models(models[:1])


def test_models_of_different_shapes_are_refused_by_the_layer(own: list[Path]) -> None:
    break_tensor(own[1], DOWN, torch.zeros(3, 4))
    with pytest.raises(CartError, match=rf"{DOWN} is \(32, 64\) in math and \(3, 4\) in code"):
        inspect_models(own)


@pytest.mark.parametrize("role", ["model", "base", "merged"])
def test_models_of_different_depths_are_refused(own: list[Path], role: str) -> None:
    file = own[2] / "model.safetensors"
    tensors = {name: one for name, one in load_file(file).items() if ".layers.1." not in name}
    save_file(tensors, file, {"format": "pt"})
    others = {} if role == "model" else {role: own[2]}
    with pytest.raises(CartError, match=r"math has 2 layers in model.layers and .* 1: .* shapes"):
        inspect_models(own if role == "model" else own[:2], **others)


def test_a_last_layer_of_another_kind_is_left_out_with_a_note(own: list[Path]) -> None:
    """As DeepSeek's, which fine-tuned models are saved without."""
    for name in ("self_attn.q_proj", "eh_proj"):
        break_tensor(own[1], f"model.layers.2.{name}.weight", torch.zeros(32, 32))
    found = inspect_models(own)
    assert any("model.layers.2" in note and "left out" in note for note in found.notes)


def test_heads_of_different_sizes_are_left_out_with_a_note(own: list[Path], base: Path) -> None:
    break_tensor(own[1], "lm_head.weight", torch.zeros(3, 32))
    found = inspect_models(own, base=base)
    assert "lm_head.weight" not in [record["tensor"] for record in found.records]
    assert any("lm_head.weight" in note and "left out" in note for note in found.notes)


@pytest.mark.parametrize("which", [0, 2])
def test_a_tensor_that_one_lacks_is_left_out_with_a_note(own: list[Path], which: int) -> None:
    file = own[which] / "model.safetensors"
    tensors = load_file(file)
    del tensors[DOWN]
    save_file(tensors, file, {"format": "pt"})
    found = inspect_models(own)
    assert any(DOWN in note for note in found.notes)
    assert DOWN not in [record["tensor"] for record in found.records]


def test_values_that_are_not_finite_are_named(own: list[Path], base: Path, tmp_path: Path) -> None:
    break_tensor(own[1], DOWN, math.nan)
    with pytest.raises(CartError, match=f"{DOWN}.*code holds 1 NaN"):
        inspect_models(own, base=base, out=tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_equal_models_are_refused(models: list[Path], tmp_path: Path) -> None:
    twin = shutil.copytree(models[0], tmp_path / "twin")
    with pytest.raises(CartError, match="math, twin do not differ from each other"):
        inspect_models([models[0], twin])


def test_strangers_and_quantised_models_are_refused(
    own: list[Path], base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(4, 4)}, other)
    with pytest.raises(CartError, match="lacks most tensors"):
        inspect_models([own[0], other])
    break_tensor(own[1], DOWN, torch.zeros(32, 64, dtype=torch.float8_e4m3fn))
    with pytest.raises(CartError, match="float8"):
        inspect_models(own)


def test_a_model_that_is_not_there_is_named(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CartError, match="nowhere does not exist"):
        inspect_models([models[0], tmp_path / "nowhere"])


def test_names_are_one_a_model_and_no_two_alike(models: list[Path]) -> None:
    with pytest.raises(CartError, match="3 models but 2 names"):
        inspect_models(models, names=["a", "b"])
    with pytest.raises(CartError, match="two models are called 'a'"):
        inspect_models(models, names=["a", "a", "b"])
    assert inspect_models(models, names=["a", "b", "c"]).names == ["a", "b", "c"]


def test_one_model_under_two_paths_would_count_twice(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(models[0])
    with pytest.raises(CartError, match=r"math and .*link are one model"):
        inspect_models([*models, tmp_path / "link"], names=["a", "b", "c", "d"])


def test_a_base_that_is_not_here_is_told(adapters: list[Path]) -> None:
    (note,) = inspect_models(adapters, base="nowhere/base").notes
    assert note.startswith("the base nowhere/base is not here")
    assert inspect_models(adapters).notes == []


def test_an_adapter_alone_and_with_its_base_would_count_twice(
    adapters: list[Path], base: Path
) -> None:
    with pytest.raises(CartError, match="are one model, which would count twice"):
        inspect_models([adapters[0], f"{base}+{adapters[0]}", adapters[1]], names=["a", "b", "c"])


def test_a_base_of_other_adapters_is_refused_or_told(
    adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    other = save_base(tmp_path, num_hidden_layers=2, hidden_size=48)
    with pytest.raises(CartError, match=r"is not that of the adapters.*32 x 32"):
        inspect_models(adapters, base=other)
    # Two weights whose names end alike: which of them is changed nobody knows.
    tensors = load_file(base / "model.safetensors")
    two = Path(shutil.copytree(base, tmp_path / "two"))
    towers = {f"{tower}.{name}": own.clone() for tower in "ab" for name, own in tensors.items()}
    save_file(towers, two / "model.safetensors", {"format": "pt"})
    found = inspect_models(adapters, base=two)
    assert found.movements()[0].share is None
    assert any(note.startswith("4 of 4 weights that the adapters change") for note in found.notes)


def test_biases_of_adapters_are_left_out_with_a_note(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen2")
    folders = save_loras(tmp_path / "adapters", base, [{}, {}], lora_bias=True)
    assert any("lora_bias" in note for note in inspect_models(folders, base=base).notes)


def test_what_adapters_lack_or_hold_whole_is_said(base: Path, tmp_path: Path) -> None:
    configs = [{"modules_to_save": ["lm_head"]}] * 3
    configs[1] = {**configs[1], "target_modules": ["q_proj"]}
    folders = save_loras(tmp_path / "adapters", base, configs)
    found = inspect_models(folders, base=base)
    assert any(note.startswith("code lacks 2 of 4 modules") for note in found.notes), found.notes
    assert any("lm_head" in note and "left out" in note for note in found.notes), found.notes
