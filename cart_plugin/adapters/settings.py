"""How adapters are merged: the options, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from cart_plugin.checkpoints.dtypes import STORED
from cart_plugin.checkpoints.labels import told_apart
from cart_plugin.errors import CartError
from cart_plugin.merging.inputs import normalised
from cart_plugin.merging.settings import CartSettings

Method = Literal["auto", "cart", "linear"]
METHODS = get_args(Method)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """How adapters are merged.

    Attributes:
        method: its name.
        settings: of `cart_plugin.merging.spans.merge_in_span`; None for the mean.
        rank: of the result; None for the largest of the adapters' ranks, "full" for the sum of
            them, which loses nothing.
        dtype: of the result; None for the adapters' own.
    """

    method: Method
    settings: CartSettings | None
    rank: int | Literal["full"] | None
    dtype: torch.dtype | None


def request(
    *,
    method: str = "auto",
    rank: int | str | None = None,
    lambda_: float | None = None,
    rank_ratio: float | None = None,
    keep: int | None = None,
    dtype: str | None = None,
) -> Request:
    """Check the options of `cart_plugin.adapters.merge_adapters`.

    Raises:
        CartError: a value of the wrong kind, or one that its method does not take.
    """
    if method not in METHODS:
        raise CartError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in STORED):
        raise CartError(f"dtype must be one of {', '.join(STORED)}, got {dtype!r}")
    if rank not in (None, "full") and not _is_count(rank):
        raise CartError(f"rank must be a positive whole number or 'full', got {rank!r}")
    if isinstance(lambda_, str):
        raise CartError(
            f"lambda must be a number, got {lambda_!r}; the method auto has nothing to set"
        )
    if lambda_ is not None and method != "cart":
        raise CartError(f"lambda is of the method cart, and {method} has none; leave it out")
    if method == "linear" and not (rank_ratio is keep is None):
        raise CartError("rank_ratio and keep are of cart and auto; linear keeps all directions")
    if rank_ratio is not None and keep is not None:
        raise CartError(
            f"rank_ratio ({rank_ratio}) and keep ({keep}) are two rules; give one of them"
        )
    if keep is not None and not _is_count(keep):
        raise CartError(f"keep must be a positive whole number, got {keep!r}")
    settings = None
    if method != "linear":
        scale: Any = "auto" if method == "auto" else 1.0 if lambda_ is None else lambda_
        settings = CartSettings(rank_ratio=rank_ratio, rank=keep, lambda_=scale)
    chosen: Any = rank
    named: Any = method
    return Request(named, settings, chosen, None if dtype is None else STORED[dtype])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def listed(adapters: Iterable[_T]) -> list[_T]:
    """The adapters as a list; one by itself is refused: a string would be read letter by letter.

    Raises:
        CartError: that it is.
    """
    if isinstance(adapters, (str, Path)) or not isinstance(adapters, Iterable):
        raise CartError(f"adapters must be a list, got {str(adapters)!r} by itself")
    return list(adapters)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The adapters' weights, scaled to a sum of 1.

    Raises:
        CartError: of another number, not finite, or of no positive sum.
    """
    if weights is None:
        return normalised(None, count, "adapters")
    if hasattr(weights, "tolist"):  # an array or a tensor
        weights = weights.tolist()
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Sequence):
        raise CartError("weights must be a list, one an adapter in their order")
    if len(weights) != count:
        raise CartError(f"{count} adapters but {len(weights)} weights; give one an adapter")
    return normalised([_finite(weight) for weight in weights], count, "adapters")


def _finite(weight: Any) -> float:
    """A weight as a float.

    Raises:
        CartError: it is no number, or not finite.
    """
    found = math.nan
    if not isinstance(weight, bool) and isinstance(weight, Real):
        with suppress(OverflowError):  # a whole number may be larger than any float
            found = float(weight)
    if not math.isfinite(found):
        raise CartError(f"weights must be finite numbers, got {weight!r:.40}")
    return found


def names_of(paths: Sequence[str | Path], names: Sequence[str | None] | None) -> list[str]:
    """What to call adapters: by their folders where no names are given.

    Raises:
        CartError: of another number, empty, or two alike.
    """
    if not paths:
        raise CartError("name at least one adapter")
    own = told_apart(paths)
    given = [None] * len(paths) if names is None else list(names)
    if len(given) != len(paths):
        raise CartError(f"{len(paths)} adapters but {len(given)} names")
    chosen = [name if said is None else said for name, said in zip(own, given, strict=True)]
    for name in chosen:
        if not isinstance(name, str) or not re.search(r"\S", name):
            raise CartError(f"an adapter's name must be a word, got {name!r}")
        if chosen.count(name) > 1:
            raise CartError(f"two adapters are called {name!r}; give names of their own (names)")
    return chosen
