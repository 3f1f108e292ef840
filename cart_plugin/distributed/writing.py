"""A part's tensors, hashed, looked through and written by a thread while others are merged."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from mergekit.graph import Task

from cart_plugin.checkpoints.digests import tensor_digest
from cart_plugin.checkpoints.writing import TensorFile
from cart_plugin.distributed.plan import Part
from cart_plugin.errors import CartError


class ToPart(Task[Any]):
    """Stands where mergekit's tasks expect its `TensorWriterTask`: a writer that is there."""

    file: Any

    def arguments(self) -> dict[str, Task]:
        """Nothing comes before it."""
        return {}

    def execute(self) -> Any:
        """The writer."""
        return self.file


class PartFile:
    """Takes a part's tensors in any order, and writes them where they lie in their shard's file.

    Each is written by a thread while the next is merged. One is under way at most, so that memory
    is bounded; an error of the thread comes up with the next call.

    Attributes:
        digests: of the tensors written so far, by name.
        suspects: names of those that hold a NaN or an infinity.
    """

    def __init__(self, folder: Path, part: Part, count: Callable[[int], None]) -> None:
        """Open the file, which is there; `count` receives the bytes of each tensor written."""
        self.digests: dict[str, str] = {}
        self.suspects: list[str] = []
        self._layout = {it.name: (it.dtype, it.shape) for it in part.outputs}
        self._count = count
        self._file = TensorFile(folder / part.shard.file, part.shard.layout, anew=False)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:  # noqa: ARG002
        """Take a tensor; what belongs to another part is left to its maker.

        Raises:
            CartError: it is not what was foreseen.
        """
        if name not in self._layout or name in self.digests:
            return
        dtype, shape = self._layout[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise CartError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype} and was foreseen as {shape} of "
                f"{dtype}; merge without --workers, and please report this with the recipe"
            )
        self._wait()
        self._writing = self._thread.submit(self._write, name, tensor)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to("cpu").contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            self.suspects.append(name)
        self.digests[name] = tensor_digest(tensor)
        self._file.write(name, tensor)
        self._count(tensor.numel() * tensor.element_size())

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                self._finish()
        finally:
            self._thread.shutdown()
            self._file.abandon()

    def _finish(self) -> None:
        missing = [name for name in self._layout if name not in self.digests]
        if missing:
            raise CartError(
                f"mergekit gave no value for {missing[0]}; merge without --workers, and please "
                "report this with the recipe"
            )
        self._file.close()
