"""Models that are in memory: the same measures, as rows for a table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.inspect.measures import Record, record
from cart_plugin.inspect.places import places
from cart_plugin.inspect.weights import of_tensors
from cart_plugin.merging.inputs import check_same_tensors
from cart_plugin.wording import count, some


def inspect_state_dicts(
    state_dicts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    merged: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    turned: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What fine-tuning did to the weights, and what each merge method would lose of it.

    Args:
        state_dicts: one a model, or a mapping from the models' names to them; all with the same
            tensors. Lazily loading mappings work: each tensor is asked for once, when it is due.
        base: the base model's; differences are from the average without one.
        merged: of a merged model, which is judged beside the methods.
        weights: how much each model counts in merges, in their order; None for alike.
        turned: names of the weights that are stored as (inputs, outputs), such as GPT-2's
            (`cart_plugin.inspect.turned_parameters` tells them of a model).

    Returns:
        A row for each weight that methods decompose and each model, as `rows_of` has them: what
        `pandas.DataFrame` takes.

    Raises:
        CartError: fewer than two models, tensors that one of them lacks, of different shapes, not
            finite or quantised.
    """
    named = (
        dict(state_dicts)
        if isinstance(state_dicts, Mapping)
        else {str(index): held for index, held in enumerate(state_dicts)}
    )
    records = records_of(named, base=base, merged=merged, weights=weights, turned=turned)
    return [row for found in records for row in rows_of(found, list(named))]


def records_of(
    named: Mapping[str, Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    merged: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    turned: Collection[str] = (),
) -> Iterator[Record]:
    """Records of all floating-point tensors, one after the other; see `inspect_state_dicts`.

    Raises:
        CartError: as there; at the first one for what the models lack.
    """
    models = list(named)
    if len(models) < 2:
        raise CartError(f"inspect compares two models or more, got {len(models)}")
    check_same_tensors(named)
    for who, held in (("the base model", base), ("the merged model", merged)):
        missing = [] if held is None else sorted(set(named[models[0]]) - set(held))
        if missing:
            raise CartError(
                f"{who} lacks {count(len(missing), 'tensor')} that the models have "
                f"({some(missing)}); give the one that they were made from"
            )
    where = places(list(named[models[0]]))
    for name in named[models[0]]:
        tensors = [named[model][name] for model in models]
        if not all(tensor.is_floating_point() for tensor in tensors):
            continue
        weight = of_tensors(
            name,
            tensors,
            models,
            None if base is None else base[name],
            None if merged is None else merged[name],
            weights,
            turned=name in turned,
        )
        yield record(weight, models, where=where[name])


def rows_of(found: Record, models: Sequence[str]) -> list[dict[str, Any]]:
    """A record of one weight as rows, one a model; none for what is not decomposed.

    `weight` is how much the model counts in merges, 1 on average. `moved` is the norm of the
    difference from the base (or the average), `moved_share` relative to the weight. `rank` has the
    directions of that difference that no rounding explains (from the average, the other models'
    are among them), `numerical_rank` those that hold 99 %; None for more than were solved for.
    `row_overlap` and `cosine` are the largest with another model. `kept METHOD`
    and `lost METHOD` are shares of the model's own answer on the inputs that its difference points
    at: 1 and 0 for all of it.
    """
    if not found["decomposed"]:
        return []
    rows = []
    for index, model in enumerate(models):
        norm = None if found["norm"] is None else found["norm"][index]
        row = {key: found[key] for key in ("tensor", "layer", "module", "full_rank", "rho")}
        row |= {
            "model": model,
            "weight": found["weights"][index],
            "moved": found["moved"][index],
            "moved_share": found["moved"][index] / norm if norm else None,
            **{key: found[key][index] for key in ("rank", "numerical_rank", "effective_rank")},
            "energy_at_8_percent": found["energy"][index],
            "row_overlap": _largest(found["row_overlap"][index], index),
            "column_overlap": _largest(found["column_overlap"][index], index),
            "cosine": _largest(found["cosines"][index], index),
        }
        for method, judged in found["methods"].items():
            row |= {f"{kind} {method}": judged[kind][index] for kind in ("kept", "lost")}
        rows.append(row)
    return rows


def _largest(values: Sequence[float | None], own: int) -> float | None:
    others = [value for index, value in enumerate(values) if index != own and value is not None]
    return max(others, default=None)
