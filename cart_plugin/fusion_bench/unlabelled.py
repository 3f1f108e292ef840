"""Test data sets, loaded once and without labels, for FusionBench's classes that ask for more."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from fusion_bench.modelpool import BaseModelPool
from torch.utils.data import Dataset

from cart_plugin.errors import CartError


class Unlabelled(Dataset[Any]):
    """Images of any data set: labels are not read, and need not be there.

    FusionBench 0.2.33's `ImageClassificationDataset` fails on rows without one.

    Args:
        data: rows are mappings with an ``image``, tuples that begin with one, or images.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.data[index]
        if isinstance(row, dict):
            return row["image"], 0
        return (row[0] if isinstance(row, (tuple, list)) else row), 0


def check_not_empty(data: Mapping[str, Sized]) -> None:
    """Refuse tasks without test data.

    Raises:
        CartError: there are some.
    """
    if empty := [task for task, rows in data.items() if not len(rows)]:
        raise CartError(f"there are no test inputs of {', '.join(empty)}")


class LoadedPool:
    """A model pool with test data that have been loaded, by task."""

    def __init__(self, pool: BaseModelPool, data: Mapping[str, Any]) -> None:
        self._pool, self._data = pool, data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def load_test_dataset(self, task: str) -> Any:
        """A task's inputs."""
        return self._data[task]
