"""The benchmark of threads."""

from __future__ import annotations

import json

import torch

from benchmarks.common.measure import RESULTS
from benchmarks.solvers import threads
from cart_plugin.merging import differences


def test_both_ways_merge_the_same_and_leave_things_as_they_were() -> None:
    tensors = [torch.randn(24, 32, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    rule, before = differences.worth, torch.get_num_threads()
    as_it_is, other = (way() for way in threads.merges(tensors).values())
    assert torch.allclose(as_it_is, other, atol=1e-5)  # type: ignore[arg-type]
    assert differences.worth is rule
    one, every = (way() for way in threads.decompositions(tensors[0], "exact").values())
    assert torch.allclose(one.dense(), every.dense(), atol=1e-5)  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


def test_times_are_medians_of_turns() -> None:
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    found = threads.measured(ways, 3)
    assert called == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert set(found) == {"a", "b"}


def test_each_case_is_a_row_quiet_and_busy() -> None:
    found = {}
    for place, slower in (("quiet", 1), ("busy", 3)):
        times = {"as it is": 10.0, "one after the other": 20.0 * slower}
        found[f"merge | 8x8 | {place}"] = {"ms": times}
        found[f"fast | 8x8 | {place}"] = {"ms": {"one thread": 4.0, "all threads": 3.0 * slower}}
    conditions = {"machine": {"processor": "Some CPU", "cores": 2}, "threads": 2, "runs": 3}
    lines = threads.markdown(conditions, [], found).splitlines()
    assert "| 8x8 | 10 | 20 | 2.00 | 10 | 60 | 6.00 |" in lines
    assert "| 8x8 | `fast` | 4 | 3 | 0.75 | 4 | 9 | 2.25 |" in lines
    names = [name for name, _ in threads.cases(quick=True)]
    assert names == ["merge | 96x96", "fast | 96x96", "exact | 96x96", "merge | 4 of 96x96"]


def test_the_saved_table_is_that_of_the_saved_figures() -> None:
    saved = json.loads((RESULTS / "solvers" / "threads.json").read_text())
    given = (saved["conditions"], saved["measured"], saved["cases"])
    assert threads.markdown(*given) == (RESULTS / "solvers" / "threads.md").read_text()
