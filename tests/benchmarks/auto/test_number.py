"""Accuracy against the number of models: every method's merge, resuming, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.auto import number, study
from benchmarks.auto.members import members_of, sets_of
from benchmarks.suites import Encoders, task_order
from cart_plugin import CartSettings, merge_state_dicts

TASKS = task_order("vision")
SCALES = dict.fromkeys(members_of("vision"), 0.5)


def encoders(folder: Path) -> tuple[Encoders, list[tuple[str, ...]]]:
    """Encoders, and the tasks that they are judged on, call by call."""
    generator = torch.Generator().manual_seed(0)
    base, *tensors = [torch.randn(24, 40, generator=generator) for _ in range(1 + len(TASKS))]
    own = {"a.weight": base, "norm": base[0].clone(), "buffer": torch.zeros(2)}  # not theirs
    save_file(own, folder / "model.safetensors")
    tuned = {
        task: {"a.weight": base + tensor, "norm": tensor[0].clone()}
        for task, tensor in zip(TASKS, tensors, strict=True)
    }
    judged: list[tuple[str, ...]] = []

    def judge(tensors: object, tasks: tuple[str, ...]) -> dict[str, float]:
        judged.append(tuple(tasks))
        return dict.fromkeys(tasks, 0.375)

    return Encoders(tuned, judge, pretrained=folder), judged


@pytest.mark.parametrize("method", [one for one in number.METHODS if one != number.FINE_TUNED])
def test_every_method_merges_matrices_its_own_way_and_averages_the_rest(
    method: str, tmp_path: Path
) -> None:
    held, _ = encoders(tmp_path)
    tuned = [held.tuned[task] for task in TASKS[:3]]
    base = {"a.weight": tuned[0]["a.weight"] * 0 + 1, "norm": tuned[0]["norm"] * 0 + 1}
    found = number.merge(method, tuned, base, 0.5)
    mean = {name: sum(one[name] for one in tuned) / 3 for name in base}
    assert torch.allclose(found["norm"], mean["norm"], atol=1e-6)
    assert found["a.weight"].isfinite().all()
    assert torch.allclose(found["a.weight"], mean["a.weight"], atol=1e-4) == (method == "average")
    if method == number.AUTO:
        auto = CartSettings(lambda_="auto")
        assert torch.equal(found["a.weight"], merge_state_dicts(tuned, auto, base=base)["a.weight"])


def test_it_resumes_and_the_table_has_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, judged = encoders(tmp_path)
    monkeypatch.setattr(number, "load_encoders", lambda *args: held)
    folder = tmp_path / "number"
    number.number("vision", 0, SCALES, folder)
    # Each model alone; then each set, under both heads where experts overlap.
    alone = [(task,) for task in TASKS] + [(task,) for task in TASKS[::2]]
    sets = [tasks for chosen in sets_of("vision").values() for tasks in chosen]
    for one, other in zip(TASKS[::2], TASKS[1::2], strict=True):
        sets += [(one, other), (one,)]
    assert judged == alone + sets * (len(number.METHODS) - 1)
    number.number("vision", 0, SCALES, folder)
    assert judged == alone + sets * (len(number.METHODS) - 1)
    number.write_report(tmp_path)
    assert (tmp_path / "number.png").stat().st_size > 10_000
    _, _, heading, _, *rows = (tmp_path / "number.md").read_text().splitlines()
    assert heading.startswith("| vision, 1 seed | 2 models | 3 models |")
    assert [row.split(" | ")[0] for row in rows] == [f"| {title}" for title in number.METHODS]
    assert rows[0].endswith("| 37.5 | 37.5 | 37.5 | 37.5 | 37.5 | 37.5 |")
    assert all("**" not in row for row in rows if not row.startswith("| average"))


def test_a_method_with_fewer_seeds_says_so_and_is_not_called_the_best(tmp_path: Path) -> None:
    def record(seed: int, **accuracies: float) -> None:
        cases = {
            method: {count: [{"mnist": value}] for count in members_of("vision")}
            for method, value in accuracies.items()
        }
        path = tmp_path / "number" / f"vision-{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cases": cases, "measured": []}))

    record(0, cart_auto=0.5, WUDI=0.9)
    record(1, cart_auto=0.7)
    rows = number.markdown(number.results(tmp_path)).splitlines()
    assert any(row.startswith("| cart_auto | **60.0 ± 10.0** |") for row in rows)
    assert any(row.startswith("| WUDI (1 of 2 seeds) | 90.0 |") for row in rows)


def test_task_arithmetic_takes_the_scale_that_the_study_found_best(tmp_path: Path) -> None:
    counts = sets_of("vision")
    cases = {
        study.task_arithmetic(scale): {
            count: [{"mnist": 0.5 - abs(scale - (0.3 if count == "8" else 1.0))}]
            for count in counts
        }
        for scale in study.SCALES
    }
    path = tmp_path / "study" / "vision-0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"cases": cases}))
    found = number.scales_of("vision", tmp_path)
    assert found == {count: 0.3 if count == "8" else 1.0 for count in [*counts, "overlapping"]}
