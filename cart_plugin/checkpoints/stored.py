"""How the models of a merge lie on the disk, as far as it matters to what is made of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence

import torch

from cart_plugin.checkpoints.names import of_any_layer
from cart_plugin.checkpoints.orientation import (
    is_one_of,
    may_be_turned,
    not_told,
    turned_weights,
)
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError, CartWarning


class Stored:
    """The headers of a merge's models."""

    def __init__(self) -> None:
        self._models: dict[Hashable, Checkpoint] = {}
        self._turned: set[str] | None = None  # names of any layer
        self._lock = threading.Lock()  # mergekit works each GPU in a thread

    def add(self, models: Mapping[Hashable, Checkpoint]) -> None:
        """Take models in; of some perhaps no header could be read."""
        self._models |= {model: found for model, found in models.items() if found.tensors}

    def is_turned(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a weight is stored as (inputs, outputs).

        Warns, once, if that cannot be told: of models that transformers does not know.
        """
        if not self._models or not may_be_turned(name, shape):
            return False
        with self._lock:
            if self._turned is None:
                self._turned = self._find()
        return is_one_of(name, self._turned)

    def _find(self) -> set[str]:
        try:
            return set(map(of_any_layer, turned_weights(next(iter(self._models.values())))))
        except CartError as error:
            warnings.warn(not_told(error), CartWarning, stacklevel=4)
            return set()

    def is_finer(self, model: Hashable, name: str, dtype: torch.dtype) -> bool:
        """Whether a dtype rounds what a model's file holds of a tensor.

        The file may have another name for it; all its matrices count then.
        """
        found = self._models.get(model)
        if found is None:
            return False
        infos = [found.tensors[name]] if name in found.tensors else found.tensors.values()
        matrices = {info.dtype for info in infos if info.is_floating and len(info.shape) > 1}
        eps = torch.finfo(dtype).eps
        return any(torch.finfo(one).eps < eps for one in matrices if one is not None)
