"""The comparison of ways to merge adapters, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.adapters import accuracy, cost, exact
from benchmarks.adapters.accuracy import Setting
from benchmarks.adapters.loaded import Loaded
from benchmarks.adapters.ways import WAYS

TASKS = ("one", "two", "three", "four")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        model = base()
        torch.manual_seed(1 + seed)
        names = ["q_proj", "k_proj", "down_proj"]
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(str(root / task))
    return {task: root / task for task in TASKS}


def loaded(folders: dict[str, Path]) -> Loaded:
    """Its judge says how far the weights are from the base's."""
    start = {name: one.clone() for name, one in base().state_dict().items()}

    def judge(model: torch.nn.Module, tasks: Sequence[str]) -> dict[str, float]:
        far = sum(
            float((one - start[name.replace(".base_layer", "")]).square().sum())
            for name, one in model.state_dict().items()
            if "lora" not in name
        )
        return dict.fromkeys(tasks, 1 / (1 + far))

    return Loaded(base(), folders, judge)


def test_what_is_added_is_taken_off_again(folders: dict[str, Path]) -> None:
    held = loaded(folders)
    alone = held.deltas("one")
    assert held.judge(alone, ["one"])["one"] < 1
    assert held.judge({}, ["one"]) == {"one": 1.0}
    size = sum(float(delta.square().sum()) for delta in alone.values())
    assert abs(held.judge(alone, ["one"], 2.0)["one"] - 1 / (1 + 4 * size)) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_each_way_changes_all_layers_by_no_more_than_its_rank(
    way: str, folders: dict[str, Path]
) -> None:
    held = loaded(folders)
    deltas = WAYS[way].merge(held, TASKS, 2)
    assert deltas.keys() == held.layers.keys()
    ranks = WAYS[way].ranks
    most = 2 * (4 if ranks is None else ranks)
    for delta in deltas.values():
        assert 1 <= int(torch.linalg.matrix_rank(delta, rtol=1e-4)) <= most
    assert set(held.peft.peft_config) == set(TASKS)  # what was made is gone


def test_another_best_scale_is_judged_anew(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "SETTINGS", {"tiny": Setting("language", 2, (4,))})
    monkeypatch.setattr(accuracy, "ways_for", lambda _: ["PEFT cat", "linear (the average)"])
    monkeypatch.setattr(Setting, "load", lambda *_: loaded(folders))
    accuracy.tune("tiny", tmp_path)
    accuracy.test("tiny", 0, tmp_path)
    file = tmp_path / "tiny-validation.json"
    record = json.loads(file.read_text())
    del record["cases"]["4: PEFT cat"]["0.125"]  # it was not among the scales
    record["cases"]["4: PEFT cat"] |= {"0.25": 0.0, "2": 1.0}
    file.write_text(json.dumps(record))
    accuracy.tune("tiny", tmp_path)
    found = json.loads(file.read_text())["cases"]["4: PEFT cat"]
    assert set(found) == {"0.125", "0.25", "0.5", "1", "2"}
    assert found["0.25"] == 0.0  # it is known
    accuracy.test("tiny", 0, tmp_path)
    cases = json.loads((tmp_path / "tiny-0.json").read_text())["cases"]
    assert cases["4: PEFT cat"]["scale"] == 2.0
    assert cases["4: linear (the average)"]["scale"] == 1.0


def test_the_exact_form_is_the_whole_models_merge(folders: dict[str, Path]) -> None:
    found = exact.apart(loaded(folders), 2)
    assert found["largest"] < 1e-5 < 1e-2 < found["change"]
    assert found["relative"] < 1e-5


def test_costs_are_those_of_the_adapter(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "SETTINGS", {cost.SETTING: Setting("language", 2, (4,))})
    monkeypatch.setattr(Setting, "load", lambda *_: loaded(folders))
    sides = (16 + 16) + (8 + 16) + (16 + 24)
    for way, ranks in {"PEFT svd": 1, "auto, 2 r": 2, "KnOTS-TIES": 4}.items():
        assert cost.work(way)["numbers"] == 2 * ranks * sides
    assert not any(name.startswith("auto cut") for name in cost.MEASURED)
    assert cost.work(cost.ONLY_LOADED)["numbers"] == 0


def test_all_is_judged_once_and_the_scale_is_the_best_of_validation(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting("language", 2, (4,))
    monkeypatch.setattr(accuracy, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(accuracy, "SEEDS", (0, 1))
    monkeypatch.setattr(Setting, "load", lambda *_: loaded(folders))
    for _ in range(2):
        command = ["--settings", "tiny", "--seeds", "0,1", "--workers", "0", "--out", str(tmp_path)]
        done = CliRunner().invoke(accuracy.main, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        monkeypatch.setattr(Setting, "load", None)  # all is known by now
    cases = json.loads((tmp_path / "accuracy" / "tiny-1.json").read_text())["cases"]
    # The judge likes small changes.
    assert cases["4: PEFT cat"]["scale"] == 0.125
    assert cases["4: KnOTS-TIES"]["scale"] == 0.25
    assert cases["4: base"]["accuracy"] == dict.fromkeys(TASKS, 1.0)
    assert "4: auto, 4 r" not in cases
    text = (tmp_path / "accuracy.md").read_text()
    assert "| language | rank | 4, own starts, 2 seeds |" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| auto")]
    cells = {row[0].removeprefix("| "): row[2].replace("*", "") for row in rows}
    assert cells["auto, 4 r"] == cells["auto, all ranks"] != cells["auto, r"]
