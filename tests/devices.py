"""The device that the core's tests run on: `CART_TEST_DEVICE`, one of `cpu`, `cuda`, `simulated`.

The simulated one computes on the CPU and behaves as an accelerator in what breaks programs there:
its tensors and the CPU's do not mix, numpy does not take them, and reading a value waits for the
device. It shows on any machine what would fail on a GPU, or wait for one, but for the kernels.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.directions import Directions
from cart_plugin.merging.indexing import IndexedTensor

_SIMULATED = "simulated"
CHOSEN = os.environ.get("CART_TEST_DEVICE", "cpu")

# What takes operands of both: copies, and indices.
_MIXED = ("aten::copy_", "aten::index.", "aten::index_put_.")
# What makes the program wait until the device has done all before it.
_WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class _Module:
    """What autocast and `torch.random.fork_rng` ask of a device."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_rng_state(device: Any) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any) -> None:
        pass  # it is the CPU's, which is set by itself

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass


class _There(Tensor):
    """A tensor on the simulated device; `held` is where its values are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        made: _There = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(_SIMULATED, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"simulated {self.held}"

    def new_tensor(self, data: Any, *, dtype: Any = None) -> Tensor:
        # torch makes it where no mode sees it.
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)

    def tolist(self) -> Any:
        _waits["tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        return _run(function, arguments, named or {})


_waits: Counter[str] = Counter()


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """How often the program waits for the simulated device, by what it waits in."""
    _waits.clear()
    yield _waits


def _run(function: Any, arguments: Any, named: Any) -> Any:
    tensors = [it for it in tree_flatten((arguments, named))[0] if isinstance(it, Tensor)]
    there = [it for it in tensors if isinstance(it, _There)]
    name, device = function.name(), named.get("device")
    if there and not name.startswith(_MIXED):
        strict = name.startswith(("aten::cat", "aten::stack"))
        if any(strict or it.ndim for it in tensors if not isinstance(it, _There)):
            raise RuntimeError(f"{name}: tensors of two devices")
    is_there = bool(there) if device is None else torch.device(device).type == _SIMULATED
    if device is not None and not is_there and not there:
        return function(*arguments, **named)  # of another device, or the meta device
    if there and (name.startswith(_WAITING) or not is_there):
        _waits[name] += 1
    if device is not None:
        named = {**named, "device": torch.device("cpu")}
    plain = tree_map(lambda it: it.held if isinstance(it, _There) else it, (arguments, named))
    found = function(*plain[0], **plain[1])
    if not is_there:
        return found
    known = {id(it.held): it for it in there}  # results that are an operand, written in place

    def wrapped(it: Any) -> Any:
        return known.get(id(it), _There(it)) if isinstance(it, Tensor) else it

    return tree_map(wrapped, found)


class _Mode(TorchDispatchMode):
    """Takes what has no operand there, such as `torch.zeros(2, device=...)`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        return _run(function, arguments, named or {})


class _Generator(torch.Generator):
    """A generator of the CPU, whichever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        pass


@contextmanager
def simulated() -> Iterator[torch.device]:
    """The simulated device, while this lasts."""
    if not hasattr(torch, _SIMULATED):
        _setup_privateuseone_for_python_backend(_SIMULATED, _Module())
    real, torch.Generator = torch.Generator, _Generator  # type: ignore[misc]
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with _Mode():  # a state of each thread
            run(thread)

    threading.Thread.run = run_there  # type: ignore[method-assign]
    try:
        with _Mode():
            yield torch.device(_SIMULATED, 0)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        torch.Generator = real  # type: ignore[misc]


_whole = ExitStack()  # of the process
DEVICE = _whole.enter_context(simulated()) if CHOSEN == _SIMULATED else torch.device(CHOSEN)

# What takes tensors from outside of the core, and gives some back.
_DOORS = {
    "linalg.svd": ("truncated_svd",),
    "linalg.krylov": ("leading_subspace",),
    "linalg.subspace": ("near_subspace",),
    "linalg.spectra": ("spectrum", "energy_rank_of"),
    "linalg.gram": ("eigh", "eigvalsh", "largest_eigenvalue", "total_energy"),
    "linalg.rounding": ("rounding_energy", "difference_rounding"),
    "merging.cart": ("merge_tensors",),
    "merging.directions": ("directions_of",),
    "merging.indexing": ("index_tensors", "spectra_of"),
    "merging.informed": ("informed_by_base",),
    "merging.interference": ("pair_interferences", "reconstruction_errors"),
    "merging.least_interference": ("least_interference",),
    "merging.low_rank_changes": ("combine", "combine_factors"),
    "merging.state_dicts": ("merge_state_dicts",),
}


def through_the_device() -> None:
    """Let whoever calls the core from outside have it work on the device under test.

    Tensors go there and come back, so that tests need not know. Nothing is moved on the CPU.
    """
    if DEVICE.type == "cpu":
        return
    for place, names in _DOORS.items():
        home = import_module(f"cart_plugin.{place}")
        for name in names:
            inner = getattr(home, name)
            door = _door(inner)
            for module in list(sys.modules.values()):
                if _is_outside(module) and vars(module).get(name) is inner:
                    setattr(module, name, door)


def _is_outside(module: Any) -> bool:
    name = getattr(module, "__name__", "")
    inside = name.startswith(("cart_plugin.linalg", "cart_plugin.merging"))
    return name.startswith(("cart_plugin", "tests", "benchmarks")) and not inside


def _door(function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        arguments, named = _moved((arguments, named), DEVICE)
        return _moved(function(*arguments, **named), torch.device("cpu"))

    return call


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(device)
    if isinstance(value, LowRank):
        return value.to(device)
    if isinstance(value, IndexedTensor):
        return IndexedTensor(*_moved((value.centre, value.differences), device))
    if isinstance(value, Directions):
        return Directions(*_moved((value.centre, value.factors, value.kept), device))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(entry, device) for entry in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    if type(value) is dict:
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, Iterator):
        return (_moved(entry, device) for entry in value)
    return value
