"""Data sets without labels, for FusionBench's classes that ask for them."""

from __future__ import annotations

from typing import Any

from fusion_bench.modelpool import BaseModelPool
from torch.utils.data import Dataset


class Unlabelled(Dataset[Any]):
    """Images of any data set: labels are not read, and need not be there.

    FusionBench 0.2.33's `ImageClassificationDataset` fails on rows without one.

    Args:
        data: rows are mappings with an ``image``, or an image and what comes with it.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.data[index]
        return (row["image"] if isinstance(row, dict) else row[0]), 0


class UnlabelledPool:
    """A model pool whose test data sets are `Unlabelled`."""

    def __init__(self, pool: BaseModelPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def load_test_dataset(self, task: str) -> Unlabelled:
        """A task's images."""
        return Unlabelled(self._pool.load_test_dataset(task))
