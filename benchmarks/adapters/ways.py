"""The ways to merge adapters that `benchmarks.adapters.accuracy` compares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.adapters import formulas
from benchmarks.adapters.formulas import Factors
from benchmarks.adapters.loaded import Deltas, Loaded
from cart_plugin.adapters import merge_adapters

DENSITY = 0.2  # TIES' own; what PEFT's documents take, too


@dataclass(frozen=True)
class Way:
    """A way to merge adapters.

    Attributes:
        merge: takes a model, its tasks and the adapters' rank; returns what is added to weights.
        ranks: the result's rank over the adapters'; None is that of all together.
        scales: of the result, of which the validation split chooses; ``sum`` are parts of the
            adapters' sum, ``mean`` multiples of a mean, ``own`` is 1: there is nothing to choose.
        ours: made by this package.
    """

    merge: Callable[[Loaded, Sequence[str], int], Deltas]
    ranks: int | None
    scales: Literal["sum", "mean", "own"] = "own"
    ours: bool = False

    def choices(self, count: int) -> tuple[float, ...]:
        """The scales to choose from, for a number of adapters."""
        return {
            "sum": (0.5 / count, 1 / count, 2 / count, 1.0, 2.0),
            "mean": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
            "own": (1.0,),
        }[self.scales]


def _ours(
    method: Literal["auto", "cart", "linear"],
    ranks: int | None,
    loaded: Loaded,
    tasks: Sequence[str],
    rank: int,
) -> Deltas:
    """`merge_adapters`, and its folder loaded by PEFT."""

    def add(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "merged"
            adapters = [loaded.folders[task] for task in tasks]
            wanted: int | Literal["full"] = "full" if ranks is None else ranks * rank
            merge_adapters(adapters, out, method=method, rank=wanted, names=tasks)
            loaded.peft.load_adapter(str(out), adapter_name=name)

    return loaded.taken(add)


def _plain(ranks: int, loaded: Loaded, tasks: Sequence[str], rank: int) -> Deltas:
    """The exact form, cut by a plain SVD."""
    exact = _ours("auto", None, loaded, tasks, rank)
    return {name: formulas.nearest(delta, ranks * rank) for name, delta in exact.items()}


def _in_subspaces(loaded: Loaded, tasks: Sequence[str], rank: int) -> Deltas:
    """The exact form, projected onto CtM's subspaces."""
    exact = _ours("auto", None, loaded, tasks, rank)
    found = {}
    for name, adapters in loaded.factors(tasks).items():
        space = formulas.subspaces(adapters, rank)
        inner = space.left.mT @ exact[name] @ space.right.mT
        found[name] = space.left @ inner @ space.right
    return found


def _by_peft(kind: str, loaded: Loaded, tasks: Sequence[str], rank: int) -> Deltas:
    """`add_weighted_adapter`, all weights 1; scaled afterwards, which is the same."""
    options: dict[str, Any] = {}
    if kind.startswith(("ties", "dare", "magnitude")):
        options["density"] = DENSITY
    if "svd" in kind:
        options["svd_rank"] = rank
    torch.manual_seed(0)  # what DARE drops
    ones = [1.0] * len(tasks)
    return loaded.taken(
        partial(
            loaded.peft.add_weighted_adapter, list(tasks), ones, combination_type=kind, **options
        )
    )


def _by_formula(
    formula: Callable[[Sequence[Factors]], Tensor], loaded: Loaded, tasks: Sequence[str], _: int
) -> Deltas:
    with torch.no_grad():
        return {name: formula(adapters) for name, adapters in loaded.factors(tasks).items()}


def _ctm(loaded: Loaded, tasks: Sequence[str], rank: int) -> Deltas:
    formula = partial(formulas.compress_then_merge, rank=rank, density=DENSITY)
    return _by_formula(formula, loaded, tasks, rank)


WAYS: dict[str, Way] = {
    "auto, all ranks": Way(partial(_ours, "auto", None), None, ours=True),
    "auto, 4 r": Way(partial(_ours, "auto", 4), 4, ours=True),
    "auto, 2 r": Way(partial(_ours, "auto", 2), 2, ours=True),
    "auto, r": Way(partial(_ours, "auto", 1), 1, ours=True),
    "auto cut by a plain SVD, 2 r": Way(partial(_plain, 2), 2, ours=True),
    "auto cut by a plain SVD, r": Way(partial(_plain, 1), 1, ours=True),
    "auto in CtM's subspaces, r": Way(_in_subspaces, 1, ours=True),
    "cart": Way(partial(_ours, "cart", None), None, ours=True),
    "linear (the average)": Way(partial(_ours, "linear", None), None, ours=True),
    "PEFT cat": Way(partial(_by_peft, "cat"), None, "sum"),
    "PEFT svd": Way(partial(_by_peft, "svd"), 1, "sum"),
    "PEFT linear": Way(partial(_by_peft, "linear"), 1, "sum"),
    "PEFT ties": Way(partial(_by_peft, "ties"), 1, "mean"),
    "PEFT dare_ties": Way(partial(_by_peft, "dare_ties"), 1, "mean"),
    "PEFT ties_svd": Way(partial(_by_peft, "ties_svd"), 1, "mean"),
    "PEFT magnitude_prune": Way(partial(_by_peft, "magnitude_prune"), 1, "sum"),
    "KnOTS-TIES": Way(partial(_by_formula, formulas.knots_ties), None, "mean"),
    "Core Space, TSV-M": Way(partial(_by_formula, formulas.core_space_tsv), None, "sum"),
    "Core Space, Iso-C": Way(partial(_by_formula, formulas.core_space_iso), None, "sum"),
    "CtM, TIES": Way(_ctm, 1, "mean"),
    "Pico, mean": Way(partial(_by_formula, formulas.pico), None, "mean"),
}
