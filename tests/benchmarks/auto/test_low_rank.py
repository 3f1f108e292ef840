"""Variants of how adapters are combined, beside what the plugin does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.auto import low_rank
from benchmarks.auto.low_rank import VARIANTS, WAYS, combine, markdown, sets_of
from cart_plugin import CartSettings
from cart_plugin.merging.spans import Difference, Span, merge_in_span
from tests.support import random


@pytest.mark.parametrize("start", [0.0, 3.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_method_is_what_the_plugin_does(count: int, start: float) -> None:
    common = random(1, 3, 60, seed=99)
    parts = [
        Difference(random(1, 40, 3, seed=seed), start * common + random(1, 3, 60, seed=50 + seed))
        for seed in range(count)
    ]
    span = Span(parts)
    plugin = merge_in_span(span, [1 / count] * count, CartSettings(lambda_="auto")).total[0]
    taus = torch.cat([part.dense() for part in span.parts])
    found = combine(taus, 60, VARIANTS["the method"])
    assert torch.allclose(found, plugin, atol=1e-8 * float(plugin.abs().max()))
    others = [combine(taus, 60, variant) for name, variant in VARIANTS.items()]
    same = [torch.allclose(one, plugin, rtol=1e-6) for one in others]
    assert same.count(True) == 1


def test_the_table_has_all_ways(tmp_path: Path) -> None:
    sets = sets_of(["a", "b", "c", "d"])
    assert [len(chosen) for chosen in sets.values()] == [6, 4, 1]
    cases = {
        way: {
            count: [dict.fromkeys(members, number / 100) for members in chosen]
            for count, chosen in sets.items()
        }
        for number, way in enumerate(WAYS)
    }
    for seed in low_rank.SEEDS:
        record = {"cases": cases, "measured": []}
        (tmp_path / f"language-own-{seed}.json").write_text(json.dumps(record))
    text = markdown(tmp_path)
    assert "| way | language-own (2), 2 | language-own (2), 3 | language-own (2), 4 |" in text
    assert "| **the method** | 3.0 | 3.0 | 3.0 |" in text
