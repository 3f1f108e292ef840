"""What merges keep and lose of their models, a weight at a time, without judging them on a task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from cart_plugin.inspect.activations import Activations
from cart_plugin.inspect.measures import judged_on
from cart_plugin.inspect.weights import Weight
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.span_measures import answers
from cart_plugin.merging.spans import leading

Merges = Callable[[Weight], Iterator[tuple[str, Tensor]]]
"""Gives, for a weight, methods and what each of them adds to the base."""

FREE, HEARD = "", " on inputs"
KINDS = tuple(f"{what}{where}" for where in (FREE, HEARD) for what in ("kept", "lost"))


def measure(
    weights: Iterable[Weight], merges: Merges, inputs: Sequence[Activations] = ()
) -> dict[str, Any]:
    """What each method keeps and loses of each model.

    Args:
        weights: those of the models that methods decompose.
        merges: the methods.
        inputs: what the models' layers get, one a model; none to measure without data alone.

    Returns:
        ``methods``: by method and kind (`KINDS`) shares of each model's own answers over all
        weights; and, with inputs, ``layers``: by ``kept`` and ``lost`` the rank correlation over
        weights and models of what is told without data with the same on the inputs, the mean over
        methods.
    """
    told: dict[str, dict[str, list[Tensor]]] = {}  # (3, T) a weight: own, along, beside
    for weight in weights:
        _, m, n = weight.shape
        few = [leading(part, RankRule().fixed_rank(m, n) or 1) for part in weight.around.parts]
        got = {index: one.of(weight.name, weight.shape) for index, one in enumerate(inputs)}
        heard = {index: weight.answer(index, one) for index, one in got.items() if one is not None}
        for method, total in merges(weight):
            found = told.setdefault(method, {})
            found.setdefault(FREE, []).append(torch.stack(list(answers(few, total))))
            if len(heard) == len(inputs) > 0:
                judged = torch.stack(list(judged_on(total, heard, len(few))))
                found.setdefault(HEARD, []).append(judged)
            elif inputs:  # kept in step with the others
                found.setdefault(HEARD, []).append(torch.zeros(3, len(few), dtype=torch.float64))
    methods = {
        method: {
            f"{what}{where}": (sums[place] / sums[0]).tolist()
            for where, parts in kinds.items()
            for sums in (torch.stack(parts).sum(dim=0),)
            for what, place in (("kept", 1), ("lost", 2))
        }
        for method, kinds in told.items()
    }
    return {"methods": methods} | ({"layers": _over_layers(told)} if inputs else {})


def _over_layers(told: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> dict[str, float]:
    found = {}
    for what, place in (("kept", 1), ("lost", 2)):
        rhos = []
        for kinds in told.values():
            free, heard = (torch.stack(list(kinds[where])) for where in (FREE, HEARD))  # (W, 3, T)
            both = (free[:, 0] > 0) & (heard[:, 0] > 0)
            one, other = ((part[:, place] / part[:, 0])[both] for part in (free, heard))
            rho = float(spearmanr(one, other).statistic)
            if rho == rho:  # not of a method that keeps the same of all
                rhos.append(rho)
        found[what] = statistics.fmean(rhos)
    return found
