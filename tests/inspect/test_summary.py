"""What the records of all weights come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cart_plugin.inspect import summary
from cart_plugin.inspect.measures import Record
from cart_plugin.inspect.report import Report
from cart_plugin.inspect.state_dicts import records_of
from tests.support import random

NAMES = ["a", "b", "c"]
UP, DOWN = "layers.0.up.weight", "layers.1.down.weight"


def states(count: int = 3) -> list[dict[str, Tensor]]:
    """Full-rank changes of every weight."""
    return [
        {UP: random(24, 32, seed=seed), DOWN: random(24, 32, seed=50 + seed)}
        for seed in range(count)
    ]


def base() -> dict[str, Tensor]:
    return {name: random(24, 32, seed=99) for name in (UP, DOWN)}


def measured(
    dicts: list[dict[str, Tensor]], start: dict[str, Tensor] | None = None, **options: Any
) -> list[Record]:
    named = dict(zip(NAMES, dicts, strict=True))
    return list(records_of(named, base=start, **options))


def report(records: list[Record], start: str | None = "base") -> Report:
    return Report({name: name for name in NAMES}, start, None, "", False, records)


def test_a_model_that_did_not_move_is_no_part_of_what_merges_keep(tmp_path: Path) -> None:
    start = base()
    records = measured([*states(2), start], start)
    found = report(records)
    judged = found.judgements()["average"]
    assert judged.kept[2] is None
    assert judged.lost[2] is None
    kept, lost = (
        [value for value in own if value is not None] for own in (judged.kept, judged.lost)
    )
    assert len(kept) == len(lost) == 2
    assert judged.mean_lost == pytest.approx(sum(lost) / 2)
    assert judged.least_kept == min(kept)
    row = next(line for line in found.markdown().splitlines() if line.startswith("| average"))
    assert row.split("|")[4].strip() == "-"
    assert "c did not move" in "\n".join(found.advice().reasons)
    found.write(tmp_path)


def test_models_that_moved_no_matrix_have_nothing_to_judge() -> None:
    start = base()
    records = measured([start, start, start], start)
    assert summary.judgements(records) == {}


def test_a_rank_is_told_of_changes_of_a_base_alone() -> None:
    start = {UP: random(96, 128, seed=9) / 10}
    dicts = [
        {UP: start[UP] + random(96, 4, seed=seed) @ random(4, 128, seed=seed + 7) / 20}
        for seed in range(3)
    ]
    told = report(measured(dicts, start))
    assert [movement.rank for movement in told.movements()] == [4, 4, 4]
    assert "of rank 4, as of LoRA" in "\n".join(told.advice().reasons)
    around = report(measured(dicts), None)
    assert around.records[0]["rank"] == [12, 12, 12]  # of all models' changes
    assert [movement.rank for movement in around.movements()] == [None] * 3
    assert "as of LoRA" not in "\n".join(around.advice().reasons)


def test_curves_are_of_weights_that_moved() -> None:
    start = base()
    dicts = [{UP: own[UP] + start[UP], DOWN: start[DOWN]} for own in states()]
    records = measured(dicts, start)
    for kind in ("centred", "from_base"):
        both = summary.curves(records, kind)
        (moved,) = [record for record in records if record["tensor"] == UP]
        assert both == summary.curves([moved], kind)
        assert both is not None
        assert min(both["R"]) > 0
    still = [record for record in records if record["tensor"] == DOWN]
    assert summary.curves(still, "centred") is None


def test_the_worst_weights_are_those_that_add_most_to_what_is_lost() -> None:
    start = base()
    dicts = [{UP: start[UP] + own[UP], DOWN: start[DOWN] + own[DOWN] / 1e3} for own in states()]
    # The second weight hardly moved, and the third model lost all of it.
    dicts[2][DOWN] = start[DOWN] - 5 * (dicts[0][DOWN] - start[DOWN])
    records = measured(dicts, start)
    found = summary.worst(records, NAMES, "average")
    assert max(found, key=lambda entry: entry.lost).tensor == DOWN
    assert found[0].tensor == UP
    assert [entry.adds for entry in found] == sorted((e.adds for e in found), reverse=True)
    judged = summary.judgements(records)["average"]
    for name, lost in zip(NAMES, judged.lost, strict=True):
        assert sum(entry.adds for entry in found if entry.model == name) == pytest.approx(lost)
    assert "most lost by" in report(records).markdown()
