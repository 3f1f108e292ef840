"""The models that are inspected: found, and opened (headers only)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cart_plugin.checkpoints.labels import told_apart
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError
from cart_plugin.inspect.factors import Adapters
from cart_plugin.inspect.fused import Fused
from cart_plugin.inspect.sources import Named, Source, cached, open_model
from cart_plugin.inspect.whole import Whole

MERGED = "the merged model"


def open_models(
    named: Sequence[Named], base: str | None, merged: str | None, names: Sequence[str] | None
) -> Source:
    """Open models that are to be compared.

    Adapters of one base are read by their factors; beside whole models, as the whole models that
    they make, a tensor at a time.

    Args:
        named: two or more.
        base: what they were fine-tuned from; that of ``BASE+ADAPTER`` if None.
        merged: a merged model or adapter.
        names: what to call them; by their folders if None.

    Raises:
        CartError: they cannot be read, or not be compared.
    """
    if len(named) < 2:
        raise CartError(
            f"inspect compares two models or more, got {len(named)}; name the others, too"
        )
    result = None if merged is None else Named.parse(merged)
    start = _start([*named, *([] if result is None else [result])], base)
    _check_places(named, start)
    adapters = [model.adapter for model in named if model.adapter is not None]
    paths = adapters if len(adapters) == len(named) else [str(model) for model in named]
    chosen = list(names) if names is not None else told_apart(paths)
    if len(chosen) != len(named):
        raise CartError(
            f"{len(named)} models but {len(chosen)} names; give one a model, in their order"
        )
    for name in chosen:
        if chosen.count(name) > 1:
            raise CartError(f"two models are called {name!r}; name each once, or give names")
    one_base = all(_is(model.path, start) for model in named if model.path is not None)
    is_adapter = result is None or (
        result.adapter is not None and (result.path is None or _is(result.path, start))
    )
    if len(adapters) == len(named) and one_base and is_adapter:
        written = [str(model) for model in named]
        return Adapters(
            adapters, written, chosen, start, None if result is None else result.adapter
        )
    bases: dict[str, Checkpoint] = {}
    whole = [_with_base(model, start) for model in named]
    return Whole(
        [_open(model, name, bases) for model, name in zip(whole, chosen, strict=True)],
        None if start is None else open_model(start, "the base model"),
        None if result is None else _open(_with_base(result, start), MERGED, bases),
        [str(model) for model in whole],
        start,
    )


def _check_places(named: Sequence[Named], start: str | None) -> None:
    """Refuse one model under two paths; an adapter alone is one of the base ``start``.

    Raises:
        CartError: it would count twice.
    """
    seen: dict[tuple[str | None, str | None], Named] = {}
    for model in named:
        path = start if model.path is None else model.path
        place = (_place(path), _place(model.adapter))
        other = seen.setdefault(place, model)
        if other is not model:
            raise CartError(
                f"{other} and {model} are one model, which would count twice; name it once (a "
                "recipe's `weight` makes a model count more)"
            )


def _place(path: str | None) -> str | None:
    return None if path is None else os.path.realpath(path)


def _start(named: Sequence[Named], base: str | None) -> str | None:
    """The base model; without one that is named, that of the adapters if it is one."""
    if base is not None:
        return base
    bases = {
        os.path.realpath(model.path): model.path
        for model in named
        if model.path is not None and model.adapter is not None
    }
    return next(iter(bases.values())) if len(bases) == 1 else None


def _is(path: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _with_base(model: Named, base: str | None) -> Named:
    """An adapter with its base.

    Raises:
        CartError: nobody names it.
    """
    if model.path is not None:
        return model
    if base is None:
        raise CartError(
            f"{model} is an adapter, and what it is compared with is not: name its base, as "
            f"BASE+{model} or for all models (--base)"
        )
    return Named(base, model.adapter)


def _open(model: Named, name: str, bases: dict[str, Checkpoint]) -> Checkpoint:
    """A whole model, or a base and an adapter.

    Args:
        model: with the path of a whole model.
        name: what errors call it.
        bases: those that are open, by path.
    """
    assert model.path is not None
    if model.adapter is None:
        return open_model(model.path, name)
    place = os.path.realpath(cached(model.path))
    if place not in bases:
        bases[place] = open_model(model.path, model.path)
    return Fused(bases[place], model.adapter, name)
