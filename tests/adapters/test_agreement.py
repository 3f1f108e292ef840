"""What agreeing on a merge costs: adapters of experts one by one have thousands of layers."""

from __future__ import annotations

from collections.abc import Iterator, ValuesView
from pathlib import Path
from typing import Any

import pytest

from cart_plugin.adapters import inputs
from cart_plugin.adapters.agreement import agree
from cart_plugin.adapters.inputs import Layer
from cart_plugin.adapters.settings import request
from cart_plugin.adapters.work import Merge
from tests.adapters.lora import save_loras


class Counted(dict[str, Layer]):
    """An adapter's layers; counts how often one looks through all of them."""

    times = 0

    def values(self) -> ValuesView[Layer]:
        self.times += 1
        return super().values()

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


@pytest.mark.parametrize("config", [{}, {"lora_bias": True}])
def test_all_layers_are_not_looked_through_for_each(
    config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Of two modules and of fourteen as often."""
    times = []
    for number, targets in enumerate((["q_proj"], r".*\.layers\..*_proj")):
        folders = save_loras(tmp_path / str(number), base, [{}, config], target_modules=targets)
        opened = inputs.open_adapters(folders, ["a", "b"])
        for adapter in opened:
            adapter.layers = Counted(adapter.layers)
        plan = agree(opened, None)
        merge = Merge(plan, request(), [0.5, 0.5])
        assert len(merge.layout) == len(plan.shapes) * (3 if config else 2)
        times.append([adapter.layers.times for adapter in opened])  # type: ignore[attr-defined]
    assert len(plan.shapes) == 14
    assert times[0] == times[1]
