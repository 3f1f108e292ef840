"""Encoders cut to low rank, as adapters make models: the cut, each method, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.auto import adapters
from benchmarks.suites import Encoders
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.linalg.rules import SHARE_OF_NUMERICAL_RANK

TASKS = adapters.task_order("vision")


def encoders(folder: Path, size: int = 40) -> tuple[Encoders, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start, *tensors = [torch.randn(size, size, generator=generator) for _ in range(1 + len(TASKS))]
    base = {"a.weight": start, "norm": start[0].clone()}
    save_file(base | {"buffer": torch.zeros(2)}, folder / "model.safetensors")
    tuned = {
        task: {"a.weight": start + tensor, "norm": tensor[0].clone()}
        for task, tensor in zip(TASKS, tensors, strict=True)
    }
    judge = lambda _, tasks: dict.fromkeys(tasks, 0.375)  # noqa: E731
    return Encoders(tuned, judge, pretrained=folder), base


def test_the_cut_leaves_a_change_of_low_rank_in_matrices_and_nothing_else(tmp_path: Path) -> None:
    held, base = encoders(tmp_path)
    tuned = held.tuned[TASKS[0]]
    found = adapters.cut(tuned, base, rank=3)
    assert torch.equal(found["norm"], base["norm"])
    change, whole = found["a.weight"] - base["a.weight"], tuned["a.weight"] - base["a.weight"]
    values = torch.linalg.svdvals(change)
    assert torch.allclose(values[:3], torch.linalg.svdvals(whole)[:3], rtol=1e-4)
    assert values[3] < 1e-4 * values[0]


def test_the_default_share_is_what_cart_does_by_itself(tmp_path: Path) -> None:
    held, base = encoders(tmp_path, size=640)  # of which 8 % are more than the rank of three
    tuned = [adapters.cut(held.tuned[task], base) for task in TASKS[:3]]
    default = merge_state_dicts(tuned, CartSettings())["a.weight"]
    # The numerical rank, 99 % of the energy, is a little below 48.
    distances = {
        share: torch.linalg.norm(
            adapters.WAYS[adapters.share_of(share)](tuned, base)["a.weight"] - default
        )
        for share in adapters.SHARES
    }
    assert min(distances, key=distances.__getitem__) == SHARE_OF_NUMERICAL_RANK


@pytest.mark.filterwarnings("ignore::cart_plugin.errors.CartWarning")
def test_it_resumes_and_the_table_has_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = encoders(tmp_path)
    monkeypatch.setattr(adapters, "load_encoders", lambda *args: held)
    adapters.adapters("vision", tmp_path)
    monkeypatch.setattr(adapters, "load_encoders", None)
    adapters.adapters("vision", tmp_path)
    _, _, heading, _, *rows = adapters.markdown(tmp_path).splitlines()
    assert heading == "| method | vision, 3 | vision, 4 | vision, 8 |"
    assert [row.strip("| ").split(" | ")[0].strip("*") for row in rows] == list(adapters.METHODS)
    assert all(row.endswith("| 37.5 | 37.5 | 37.5 |") for row in rows)
    assert [row for row in rows if "**" in row] == [
        "| **cart, 1/8 of the rank** | 37.5 | 37.5 | 37.5 |"
    ]
