"""The study with a base model: its formulas against the plugin's, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.auto import study
from benchmarks.auto.informed import Informed, combine
from benchmarks.auto.members import sets_of
from benchmarks.suites import Encoders, task_order
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.linalg.factors import LowRank

AUTO = CartSettings(lambda_="auto")


def matrices(count: int, m: int, n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, generator=generator) for _ in range(count)]


def factored(matrix: torch.Tensor) -> LowRank:
    return LowRank(*torch.linalg.svd(matrix, full_matrices=False))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("m", "n"), [(24, 50), (50, 24)])
def test_variants_of_the_plugins_are_its_methods(count: int, m: int, n: int) -> None:
    base, *taus = matrices(count + 1, m, n)
    tuned = [{"w": base + tau} for tau in taus]
    tasks = [factored(tau) for tau in taus]
    expected = combine(tasks, Informed())
    if count > 2:
        centred = merge_state_dicts(tuned, AUTO)["w"] - base
        assert torch.allclose(combine(tasks, Informed(source="mean")), centred, atol=1e-4)
        expected = (expected + centred) / 2  # of four models
    found = merge_state_dicts(tuned, AUTO, base={"w": base})["w"] - base
    assert torch.allclose(expected, found, atol=1e-4)


@pytest.mark.parametrize("group", study.VARIANTS)
def test_every_variant_gives_finite_weights_of_its_own(group: str) -> None:
    # Of inputs that they share, for the most part: what the average lacks of them cancels.
    shared = torch.randn(19, 80, generator=torch.Generator().manual_seed(1))
    lefts = matrices(3, 60, 19)
    pairs = zip(lefts, matrices(3, 60, 80), strict=True)
    tasks = [factored(left @ shared + 0.5 * matrix) for left, matrix in pairs]
    merged = [combine(tasks, variant) for variant in study.VARIANTS[group].values()]
    merged.append(study.OTHERS["average"](tasks))
    assert all(torch.isfinite(one).all() and one.shape == (60, 80) for one in merged)
    for index, one in enumerate(merged):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in merged[:index])


def test_tasks_that_did_not_move_the_weight_give_nothing() -> None:
    nothing = [factored(torch.zeros(8, 12))] * 3
    for way in study.ways().values():
        assert not way(nothing).any()


def test_the_study_resumes_and_its_table_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, ...]] = []
    names = task_order("vision")
    base, *tensors = matrices(1 + len(names), 8, 12)
    own = {"a.weight": base, "norm": base[0].clone(), "buffer": torch.zeros(2)}  # not theirs
    save_file(own, tmp_path / "model.safetensors")
    tuned = {
        name: {"a.weight": tensor, "norm": tensor[0].clone()}
        for name, tensor in zip(names, tensors, strict=True)
    }

    def judge(tensors: object, tasks: list[str]) -> dict[str, float]:
        judged.append(tuple(tasks))
        return dict.fromkeys(tasks, 0.375)

    encoders = Encoders(tuned, judge, pretrained=tmp_path)
    monkeypatch.setattr(study, "load_encoders", lambda *args: encoders)
    study.study("vision", 0, tmp_path)
    sets = [tasks for chosen in sets_of("vision").values() for tasks in chosen]
    for one, other in zip(names[::2], names[1::2], strict=True):  # under both heads
        sets += [(one, other), (one,)]
    assert judged == sets * len(study.ways())
    study.study("vision", 0, tmp_path)
    assert len(judged) == len(sets) * len(study.ways())
    # What is known of some sets is kept, and the others are added.
    path = tmp_path / "vision-0.json"
    record = json.loads(path.read_text())
    for case in record["cases"].values():
        del case["overlapping"]
        case["2"] = [{"a": 0.375}]
    path.write_text(json.dumps(record))
    del judged[:]
    study.study("vision", 0, tmp_path)
    assert judged == sets[-8:] * len(study.ways())
    found = json.loads(path.read_text())["cases"]
    assert all(case["2"] == [{"a": 0.375}] for case in found.values())
    caption, _, *table = study.markdown(tmp_path).splitlines()
    assert "fine-tuning seeds: vision 1" in caption
    rows = len(study.OTHERS) + sum(len(group) for group in study.VARIANTS.values())
    assert len(table) == 2 + rows
    assert all(row.endswith("| 37.5 | 37.5 | 37.5 | 37.5 | 37.5 | 37.5 |") for row in table[2:])
