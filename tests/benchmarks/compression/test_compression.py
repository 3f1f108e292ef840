"""The benchmark of compressed encoders: each way to store them, its size, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import BertConfig, BertModel

from benchmarks.compression import methods as compression_methods
from benchmarks.compression import report as compression_report
from benchmarks.compression import speed as compression_speed
from benchmarks.compression import suite as compression
from benchmarks.compression.methods import WEIGHTS
from benchmarks.suites import Encoders

TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """Three tiny BERTs; the judge knows them by their distance from the fine-tuned weights."""
    folder = tmp_path_factory.mktemp("encoders")
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    model.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned: dict[str, dict[str, Tensor]] = {}
    for task in TASKS:
        for name, tensor in model.state_dict().items():
            tensor.copy_(start[name] + 0.02 * torch.randn_like(tensor))
        model.save_pretrained(folder / task)
        tuned[task] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def judge(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        assert set(tensors) == set(start)
        return {
            name: 1.0 - sum(float((tensors[key] - tuned[name][key]).norm()) for key in start) / 100
            for name in names
        }

    return Encoders(tuned, judge, {task: folder / task for task in TASKS}, folder / "base")


def squared_error(encoders: Encoders, stored: compression_methods.Stored) -> float:
    return float(compression.judged(encoders, stored)["squared_error"])


def test_models_as_they_are_lose_nothing_and_the_average_is_one_of_them(encoders: Encoders) -> None:
    whole = compression.judged(encoders, compression_methods.whole(encoders))
    assert whole["accuracy"] == dict.fromkeys(TASKS, 1.0)
    assert (whole["share"], whole["squared_error"]) == (1.0, 0.0)
    average = compression.judged(encoders, compression_methods.averaged(encoders))
    assert average["share"] == pytest.approx(1 / 3, abs=1e-4)
    assert average["squared_error"] > 0


@pytest.mark.parametrize("around_base", [False, True])
def test_compressed_sizes_are_those_of_the_files(
    encoders: Encoders, tmp_path: Path, around_base: bool
) -> None:
    served = tmp_path / "served"
    stored = compression_methods.indexed(encoders, served, around_base=around_base, rank=4)
    adapters = [*served.glob("adapters/*/adapter_*"), *served.glob("adapters/*/base.json")]
    files = [*served.glob("base/*.safetensors"), *adapters]
    assert stored.bytes == sum(file.stat().st_size for file in files)
    average = squared_error(encoders, compression_methods.averaged(encoders))
    assert 0 < squared_error(encoders, stored) < (2 if around_base else 1) * average


@pytest.mark.slow
def test_extracted_adapters_are_those_of_mergekit(encoders: Encoders, tmp_path: Path) -> None:
    stored = compression_methods.extracted(encoders, tmp_path, rank=32)
    adapters = [file.stat().st_size for file in tmp_path.glob("*/adapter_model.safetensors")]
    assert len(adapters) == 3
    assert stored.bytes == sum(adapters) + (encoders.pretrained / WEIGHTS).stat().st_size
    # At full rank nothing is lost, biases and embeddings included.
    assert squared_error(encoders, stored) == pytest.approx(0.0, abs=1e-8)


def test_an_architecture_that_mergekit_does_not_know_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    unknown = Encoders({"a": {}}, lambda *_: {}, {"a": tmp_path}, tmp_path)
    with pytest.raises(RuntimeError, match=r"\w+Error: "):
        compression_methods.extracted(unknown, tmp_path, rank=4)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_step_of_each_group(bits: int) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(24, 10)
    back = compression_methods.round_to(tensor, bits)
    flat = torch.nn.functional.pad(tensor.reshape(-1), (0, 16)).view(-1, 64)
    step = flat.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    steps = step.repeat_interleave(64)[:240].view(24, 10)
    assert ((back - tensor).abs() <= 0.501 * steps).all()
    assert torch.equal(compression_methods.round_to(torch.zeros(3, 5), bits), torch.zeros(3, 5))


def test_rounded_sizes_are_bits_and_scales(encoders: Encoders) -> None:
    full = compression_methods.models_bytes(encoders)
    stored = compression_methods.rounded(encoders, 8)
    assert 0.25 < stored.bytes / full < 0.35  # the tiny models' vectors weigh more than usual
    assert squared_error(encoders, stored) < squared_error(
        encoders, compression_methods.rounded(encoders, 4)
    )


def test_masks_take_two_models_and_a_bit_a_weight(encoders: Encoders) -> None:
    numbers = sum(tensor.numel() for tensor in encoders.tuned["a"].values())
    average = squared_error(encoders, compression_methods.averaged(encoders))
    for stored in (
        compression_methods.emr(encoders),
        compression_methods.tall_masks(encoders, dict.fromkeys(TASKS, 0.4)),
    ):
        one = compression_methods.models_bytes(encoders) // 3
        assert stored.bytes == 2 * one + 3 * (numbers // 8)
        assert 0 < squared_error(encoders, stored) < 2 * average


def test_tall_masks_keep_what_is_closer_to_the_task(encoders: Encoders) -> None:
    base = compression_methods.pretrained_tensors(encoders)
    total = {name: sum(encoders.tuned[task][name] - base[name] for task in TASKS) for name in base}
    found = compression_methods.tall_masks(encoders, dict.fromkeys(TASKS, 1.0)).restored("b")
    for name, tensor in encoders.tuned["b"].items():
        closer = (base[name] - tensor).abs() > (base[name] + total[name] - tensor).abs()
        assert torch.allclose(found[name], base[name] + closer * total[name])


def test_peft_gives_what_expand_gives(encoders: Encoders, tmp_path: Path) -> None:
    compression_methods.indexed(encoders, tmp_path / "served", rank=4)
    found = compression_methods.peft_differences(tmp_path / "served", TASKS)
    assert set(found) == {"switched", "merged"}
    assert found["switched"] > 0
    assert max(found.values()) < 1e-5


@pytest.mark.slow
def test_the_run_resumes_and_its_report_has_all_cases(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(suite: str, seed: int, split: str, most: int, tasks: Sequence[str]) -> Encoders:
        loaded.append(f"{suite} {seed} {split}")
        return encoders

    monkeypatch.setattr(compression, "load_encoders", load)
    monkeypatch.setattr(compression, "task_order", lambda suite: TASKS)
    monkeypatch.setattr(compression, "SEEDS", (0, 1))
    monkeypatch.setattr(compression, "SIZES", (0.7, 0.9))
    monkeypatch.setattr(compression, "HALF_SIZES", (0.5,))
    monkeypatch.setattr(compression, "RANKS", (2, 4))
    monkeypatch.setattr(compression, "RANK", 4)
    chosen = compression.cases
    monkeypatch.setattr(
        compression,
        "cases",
        # Without mergekit's processes; the tiny models' own sizes are larger than 22 %.
        lambda curves: {
            name: make
            for name, make in chosen(curves).items()
            if not name.startswith("extract") and not name.endswith(("17%", "22%"))
        },
    )
    arguments = ["--out", str(tmp_path), "--workers", "0"]
    done = CliRunner().invoke(compression.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert len(loaded) == 8  # test and validation
    cases = json.loads((tmp_path / "vision-0.json").read_text())["cases"]
    assert {"fine-tuned", "peft", "TALL masks", "compress, target size 70%"} <= set(cases)
    table = (tmp_path / "table.md").read_text()
    assert "| 4-bit rounding |" in table
    assert (tmp_path / "accuracy_bytes.png").stat().st_size > 10_000
    CliRunner().invoke(compression.main, arguments, catch_exceptions=False)
    assert len(loaded) == 8
    again = CliRunner().invoke(compression.main, ["--report", "--out", str(tmp_path)])
    assert table in again.output


def test_a_way_that_does_not_run_is_a_row_that_says_so() -> None:
    case = {"accuracy": {"a": 0.5}, "share": 1.0, "squared_error": 1.0}
    records = [{"fine-tuned": case, "average": case, "other": {"error": "no such thing"}}]
    assert compression_report._cells("other", records)[0] == "does not run"
    assert compression_report._cells("average", records)[2] == "100.0 %"


def test_speed_is_measured_in_turns_and_told_as_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def run(case: compression_speed.Case, command: str) -> dict[str, float]:
        calls.append(command)
        slow = command == compression_speed.EXTRACT
        return {"wall": 60.0 if slow else 10.0, "cpu": 8.0, "peak": 2.0**30}

    case = compression_speed.Case("models", tmp_path, [tmp_path], 4)
    monkeypatch.setattr(compression_speed, "find_cases", lambda quick: [case])
    monkeypatch.setattr(compression_speed, "run", run)
    arguments = ["--runs", "2", "--out", str(tmp_path)]
    for _ in range(2):  # the second finds all done
        done = CliRunner().invoke(compression_speed.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    pair = [compression_speed.EXTRACT, compression_speed.COMPRESS]
    assert calls == [*pair, *reversed(pair)]
    text = (tmp_path / "speed.md").read_text()
    assert "| models | mergekit-extract-lora | 60.0 | 8.0 | 1024 | 6.0 | 1.0 | 1.0 |" in text
