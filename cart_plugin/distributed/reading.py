"""What mergekit's tasks read inputs with: whole tensors, into memory of their own, counted.

mergekit maps files: the bytes are read when a product first touches them, while the processor
waits, and stay in memory with the pages around them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from mergekit.io import LazyTensorLoader, ShardedTensorIndex

from cart_plugin.checkpoints.headers import StoredTensor
from cart_plugin.checkpoints.reading import Checkpoint


class Reader(LazyTensorLoader):  # type: ignore[misc] # mergekit's is untyped
    """mergekit's loader of a model, read as this project reads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        count: Callable[[int], None] | None = None,
        *,
        lazy_unpickle: bool = False,
    ) -> None:
        """Read a model.

        Args:
            checkpoint: its headers.
            count: receives the bytes of each tensor that is read.
            lazy_unpickle: mergekit's option, for pickled weights.
        """
        super().__init__(ShardedTensorIndex.from_disk(str(checkpoint.path)), lazy_unpickle)
        self.folder = str(checkpoint.path)
        self._checkpoint = checkpoint
        self._count = count

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> torch.Tensor | None:
        """The values of a tensor; arguments as mergekit has them."""
        if isinstance(self._checkpoint.tensors.get(key), StoredTensor):
            found = self._checkpoint.read(key).to(device)
        else:
            found = super().get_tensor(key, device, aliases, raise_on_missing)
        if found is not None and self._count is not None:
            self._count(found.numel() * found.element_size())
        return found
