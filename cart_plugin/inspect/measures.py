"""What is said of one weight: a record of plain numbers, for the report and all that reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cart_plugin.inspect.inputs import Heard, Inputs
from cart_plugin.inspect.merges import Differences
from cart_plugin.inspect.places import Place, place
from cart_plugin.inspect.weights import Plain, Weight
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rounding import edge_within
from cart_plugin.linalg.rules import DEFAULT_RANK_RATIO, RankRule, numerical_ranks
from cart_plugin.merging.interference import (
    cancellation,
    effective_rank,
    interference,
    pair_interferences,
    reconstruction_errors,
)
from cart_plugin.merging.span_measures import Answers, answers, overlaps
from cart_plugin.merging.spans import leading

REVISION = 3
"""Raised when the records of the same models come to be others."""

RATIOS = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
"""Ranks of the curves, as shares of the full rank."""

_SPECTRUM = 48  # singular values a model that are drawn
_EXACT = 1e-5  # of the largest singular value: what fp32 factors of fp32 products are sure of
_EDGES = 2.0  # rounding's largest singular value, times this, is no rounding

Record = dict[str, Any]


def record(
    weight: Weight | Plain,
    models: Sequence[str],
    inputs: Mapping[int, Inputs] | None = None,
    where: Place | None = None,
) -> Record:
    """All that is measured of a weight.

    Args:
        weight: of T models.
        models: their names.
        inputs: activations of some of them, by number; None where none are measured.
        where: the weight is in the model; what its own name says if None.

    Returns:
        Plain numbers, lists in the order of the models, and None for what is not known.
    """
    with torch.no_grad():
        found: Record = _rounded(_record(weight, models, inputs))
    own = where or place(weight.name)
    return {"tensor": weight.name, **own._asdict(), **found}


def _rounded(value: Any) -> Any:
    """Six digits: no measure has more to say, and files of them are half as large."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _record(
    weight: Weight | Plain, models: Sequence[str], inputs: Mapping[int, Inputs] | None
) -> Record:
    inner = weight.inner if isinstance(weight, Plain) else weight.around.inner
    moved = inner.diagonal().clamp_min(0).sqrt()
    found: Record = {
        "shape": list(weight.shape),
        "decomposed": isinstance(weight, Weight),
        "norm": None if weight.norms is None else weight.norms.sqrt().tolist(),
        "moved": moved.tolist(),
        "cosines": _cosines(inner),
        "apart": _distances(inner),
    }
    if isinstance(weight, Plain):
        return found
    _, m, n = weight.shape
    full = min(m, n)
    weights = [len(models) * share for share in weight.shares]
    ranks = sorted({max(1, math.floor(ratio * full)) for ratio in RATIOS})
    around = weight.around
    few = [leading(part, _default_rank(m, n)) for part in around.parts]
    kept = [leading(part, _default_rank(m, n)) for part in weight.centred.parts]
    shared = overlaps(few)
    found |= {
        "weights": weights,
        "full_rank": full,
        "effective_rank": _effective_ranks(around, full),
        "numerical_rank": _numerical_ranks(around, m, n),
        "rank": _ranks(around, m, n),
        "energy": _energies(around, m, n),
        "rho": cancellation(overlaps(kept).inner, weights),
        "row_overlap": shared.inputs.tolist(),
        "column_overlap": shared.outputs.tolist(),
        "ranks": ranks,
        "centred": _curves(weight.centred, ranks),
        "from_base": None if weight.from_base is None else _curves(weight.from_base, ranks),
        "spectrum": [
            _spectrum(part, energy)
            for part, energy in zip(around.parts, around.energies, strict=True)
        ],
        "methods": {},
    }
    given = inputs or {}
    if inputs is not None:
        found["reach"] = [
            given[index].reach if index in given else 0.0 for index in range(len(models))
        ]
    heard = {index: weight.answer(index, one) for index, one in given.items()}
    for method, total in weight.merges():
        got = answers(few, total)
        found["methods"][method] = {
            **_judged(got.own, got.along, got.beside),
            "measured": _judged(*judged_on(total, heard, len(models))) if heard else None,
        }
    return found


def _judged(own: Tensor, along: Tensor, beside: Tensor) -> Record:
    """Shares of each model's own answer, and its size: None for a model that does not differ."""

    def shares(values: Tensor) -> list[float | None]:
        pairs = zip(values.tolist(), own.tolist(), strict=True)
        return [value / size if size > 0 else None for value, size in pairs]

    return {"kept": shares(along), "lost": shares(beside), "own": own.tolist()}


def judged_on(total: Tensor, heard: Mapping[int, Heard], count: int) -> Answers:
    """The same as `answers`, on activations.

    Args:
        total: the merged difference, ``(stack, p, q)``.
        heard: by a model's number, what its difference answers (`Weight.answer`).
        count: T.
    """
    found = torch.zeros(3, count, dtype=torch.float64)
    for index, one in heard.items():
        own, got = one.own, one.answer(total)
        found[0, index] = own.double().square().sum()
        found[1, index] = (own.double() * got).sum()
        found[2, index] = (own.double() - got).square().sum()
    return Answers(*found)


def _default_rank(m: int, n: int) -> int:
    return RankRule(DEFAULT_RANK_RATIO).fixed_rank(m, n) or 1


def _cosines(inner: Tensor) -> list[list[float | None]]:
    """Of all pairs; None with a model that did not move."""
    norms = inner.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms
    return [
        [value / size if size > 0 else None for value, size in zip(*pair, strict=True)]
        for pair in zip(inner.tolist(), scale.tolist(), strict=True)
    ]


def _distances(inner: Tensor) -> list[list[float]]:
    squares = inner.diagonal()
    return (squares[:, None] + squares - 2 * inner).clamp_min(0).sqrt().tolist()


def _effective_ranks(found: Differences, full: int) -> list[float]:
    """Of a stack the mean."""
    return [
        float(effective_rank(part.S.double().cpu().square(), energy, full).mean())
        for part, energy in zip(found.parts, found.energies, strict=True)
    ]


def _numerical_ranks(found: Differences, m: int, n: int) -> list[int | None]:
    """The directions that hold 99 % but for rounding; None for more than were solved for."""
    ranks: list[int | None] = []
    for part, energy, rounding in zip(found.parts, found.energies, found.rounding, strict=True):
        own = numerical_ranks(part.S.cpu(), energy, rounding, m, n)
        known = [rank for rank in own if rank is not None]
        ranks.append(max(known) if len(known) == len(own) else None)
    return ranks


def _ranks(found: Differences, m: int, n: int) -> list[int | None]:
    """Directions that no rounding explains; None for more than were solved for.

    Of a LoRA that was merged into its base this is its rank.
    """
    ranks: list[int | None] = []
    for part, energy, rounding in zip(found.parts, found.energies, found.rounding, strict=True):
        values = part.S.double().cpu()
        edge = _EDGES * edge_within(energy, rounding, m, n)
        least = torch.maximum(_EXACT * values[..., :1].sum(dim=-1), edge)
        count = int((values > least[:, None]).sum(dim=-1).max()) if values.numel() else 0
        ranks.append(
            None if count == part.rank < min(m, n) and not _is_whole(part, energy) else count
        )
    return ranks


def _is_whole(part: LowRank, energy: Tensor) -> bool:
    """Whether nothing of a difference is left out, as of factors."""
    held = part.S.double().cpu().square().sum(dim=-1)
    return bool((held >= (1 - 1e-9) * energy).all())


def _energies(found: Differences, m: int, n: int) -> list[float | None]:
    """Share of the squared norm in the directions that the default rank keeps."""
    rank = _default_rank(m, n)
    return [
        float(part.S[..., :rank].double().square().sum()) / total if total > 0 else None
        for part, total in zip(found.parts, found.energies.sum(dim=1).tolist(), strict=True)
    ]


def _curves(found: Differences, ranks: Sequence[int]) -> Record:
    """R(k) as a share of the squared norms, and I(k) as the mean over the pairs of models.

    A pair's is at most 1, of equal differences of one direction; equal ones of k directions of one
    strength have ``1 / sqrt(k)``.
    """
    total = float(found.energies.sum())
    pairs = max(len(found.parts) * (len(found.parts) - 1), 1)
    left = reconstruction_errors(found.parts, found.energies, ranks)
    return {
        "energy": total,
        "R": [value / total if total > 0 else 0.0 for value in left.tolist()],
        "I": (interference(pair_interferences(found.parts, ranks)) / pairs).tolist(),
    }


def _spectrum(part: LowRank, energy: Tensor) -> list[float]:
    """Leading singular values as shares of the norm; of a stack the root of the mean square."""
    total = float(energy.sum())
    if total <= 0:
        return []
    return (part.S.double().square().sum(dim=0)[:_SPECTRUM] / total).sqrt().tolist()
