"""What the records of all weights come to: how far, where, how alike, and what is kept of it."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cart_plugin.inspect.measures import RATIOS, Record
from cart_plugin.inspect.merges import AUTO, AUTO_WITH_BASE, TASK_ARITHMETIC

_LOW_RANK = 0.25  # share of the full rank: a change of more is none of LoRA
_MOST = 0.9  # share of the weights that a statement about all of them has to hold for
_EQUAL = 1e-6  # of weights, 1 on average
_STILL = 1e-12  # of the squared weights: fp32 means of equal weights are not quite these
_OUTSTANDING = 1.3 / 3  # share of a third of the layers that is told


@dataclass(frozen=True)
class Movement:
    """How far a model moved, and where.

    Attributes:
        model: its name.
        moved: norm of its difference from the base or, without one, from the average.
        share: relative to its weights; None if these are not known.
        modules: share of the squared norm by kind of module, largest first.
        depths: share of it in the first, middle and last third of the layers; none if it has fewer
            than three, or several stacks of them.
        rank: the rank of all its changes of the base, where it is low; None for others, and without
            a base: differences from the average are of all models' ranks together.
        effective_rank: mean over the decomposed weights, weighted by how far each moved.
        energy: share of the squared norm that the default rank keeps.
    """

    model: str
    moved: float
    share: float | None
    modules: Mapping[str, float]
    depths: Sequence[float]
    rank: int | None
    effective_rank: float
    energy: float


@dataclass(frozen=True)
class Pair:
    """Two models.

    Attributes:
        models: their names.
        apart: norm of the difference between them, relative to how far the farther one moved.
        cosine: of what they moved.
        row_overlap: share of the leading input directions that they have in common.
        column_overlap: the same of outputs.
    """

    models: tuple[str, str]
    apart: float
    cosine: float
    row_overlap: float
    column_overlap: float


@dataclass(frozen=True)
class Judgement:
    """What a method keeps of each model on the inputs that its own difference points at.

    Attributes:
        kept: share of the model's own answer in the merge's, one a model; None for one that did not
            move, or was not measured. At least one is known.
        lost: the same of the squared norm of what the merge answers otherwise, relative to its own
            answer.
    """

    kept: Sequence[float | None]
    lost: Sequence[float | None]

    @property
    def least_kept(self) -> float:
        """By the models that moved."""
        return min(_known(self.kept))

    @property
    def mean_kept(self) -> float:
        """Over the models that moved."""
        return statistics.fmean(_known(self.kept))

    @property
    def mean_lost(self) -> float:
        """Over the models that moved."""
        return statistics.fmean(_known(self.lost))


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


@dataclass(frozen=True)
class Worst:
    """A weight in which a merge loses much of a model.

    Attributes:
        tensor: its name.
        model: the model's.
        kept: share of the model's own answer of this weight.
        lost: the same of what the merge answers otherwise.
        adds: what of the model's `lost` (of `Judgement`) is this weight's: they sum to it.
    """

    tensor: str
    model: str
    kept: float
    lost: float
    adds: float


def decomposed(records: Iterable[Record]) -> list[Record]:
    """The weights that methods decompose."""
    return [record for record in records if record["decomposed"]]


def movements(records: Sequence[Record], models: Sequence[str]) -> list[Movement]:
    """One a model."""
    return [_movement(records, index, model) for index, model in enumerate(models)]


def _movement(records: Sequence[Record], index: int, model: str) -> Movement:
    squares = [record["moved"][index] ** 2 for record in records]
    total = math.fsum(squares)
    known = [record["norm"] for record in records if record["norm"] is not None]
    size = math.fsum(norm[index] ** 2 for norm in known)
    by_module: dict[str, float] = defaultdict(float)
    layers = [record["layer"] for record in records if record["layer"] is not None]
    is_one = all(record["stack"] is None for record in records)
    count = max(layers, default=-1) + 1 if is_one else 0
    thirds = [0.0, 0.0, 0.0]
    for record, square in zip(records, squares, strict=True):
        by_module[record["module"]] += square
        if record["layer"] is not None and count >= 3:
            thirds[min(3 * record["layer"] // count, 2)] += square
    scale = 1 / total if total else 0.0
    modules = sorted(by_module.items(), key=lambda entry: -entry[1])
    matrices = [record for record in decomposed(records) if record["moved"][index] > 0]
    weights = [record["moved"][index] ** 2 for record in matrices]
    return Movement(
        model,
        math.sqrt(total),
        math.sqrt(total / size) if size and len(known) == len(records) else None,
        {name: value * scale for name, value in modules},
        [value * scale for value in thirds] if count >= 3 else [],
        _low_rank(matrices, index),
        _mean([record["effective_rank"][index] for record in matrices], weights),
        _mean([record["energy"][index] for record in matrices], weights),
    )


def _low_rank(matrices: Sequence[Record], index: int) -> int | None:
    """The rank that nearly all changes of a base stay within, if it is low."""
    if any(record["from_base"] is None for record in matrices):
        return None
    ranks = sorted(
        math.inf if record["rank"][index] is None else record["rank"][index]
        for record in matrices
        if record["full_rank"] > 1
    )
    if not ranks:
        return None
    most = ranks[min(int(_MOST * len(ranks)), len(ranks) - 1)]
    full = min(record["full_rank"] for record in matrices)
    return int(most) if 0 < most <= _LOW_RANK * full else None


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def pairs(records: Sequence[Record], models: Sequence[str]) -> list[Pair]:
    """All pairs, the nearest first."""
    count = len(models)
    inner = [[0.0] * count for _ in models]
    apart = [[0.0] * count for _ in models]
    for record in records:
        moved = record["moved"]
        for i in range(count):
            for j in range(count):
                inner[i][j] += (record["cosines"][i][j] or 0.0) * moved[i] * moved[j]
                apart[i][j] += record["apart"][i][j] ** 2
    found = []
    for i in range(count):
        for j in range(i + 1, count):
            farther = math.sqrt(max(inner[i][i], inner[j][j]))
            size = math.sqrt(inner[i][i] * inner[j][j])
            found.append(
                Pair(
                    (models[i], models[j]),
                    math.sqrt(apart[i][j]) / farther if farther else 0.0,
                    inner[i][j] / size if size else 0.0,
                    _overlap(records, "row_overlap", i, j),
                    _overlap(records, "column_overlap", i, j),
                )
            )
    return sorted(found, key=lambda pair: pair.apart)


def _overlap(records: Sequence[Record], key: str, i: int, j: int) -> float:
    """Over the weights that both moved, weighted by how far they did."""
    matrices = decomposed(records)
    weights = [record["moved"][i] * record["moved"][j] for record in matrices]
    return _mean([record[key][i][j] for record in matrices], weights)


def judgements(records: Sequence[Record], kind: str | None = None) -> dict[str, Judgement]:
    """By method, over all weights: each counts as much as its own answer is large.

    Methods that can merge all of them: `cart_auto` takes no negative weights. None where no model
    moved a weight.

    Args:
        records: of all weights.
        kind: "measured" for what activations say; None for the data-free stand-ins.
    """
    sums: dict[str, list[list[float]]] = {}
    matrices = decomposed(records)
    methods = methods_of(matrices)
    for record in matrices:
        for method in methods:
            entry = entry_of(record, method)
            judged = entry if kind is None else entry[kind]
            if judged is None:
                continue
            count = len(judged["own"])
            own, along, beside = sums.setdefault(method, [[0.0] * count for _ in range(3)])
            for index, size in enumerate(judged["own"]):
                if size:
                    own[index] += size
                    along[index] += size * judged["kept"][index]
                    beside[index] += size * judged["lost"][index]
    return {
        method: Judgement(
            [a / o if o else None for a, o in zip(along, own, strict=True)],
            [b / o if o else None for b, o in zip(beside, own, strict=True)],
        )
        for method, (own, along, beside) in sums.items()
        if any(own)
    }


def methods_of(matrices: Sequence[Record]) -> list[str]:
    """The methods that can merge all of the weights."""
    named = dict.fromkeys(method for record in matrices for method in record["methods"])
    return [
        method for method in named if all(_has(record["methods"], method) for record in matrices)
    ]


def _has(entries: Record, method: str) -> bool:
    return method in entries or (method == AUTO_WITH_BASE and AUTO in entries)


def entry_of(record: Record, method: str) -> Record:
    """What a method keeps of a weight.

    Where more models count than it takes the base for, `cart_auto` goes without.
    """
    methods: dict[str, Record] = record["methods"]
    return methods[method] if method in methods else methods[AUTO]


def weights(records: Sequence[Record], models: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The least and the largest weight of each model over all tensors; empty for equal ones."""
    held = [record["weights"] for record in decomposed(records)]
    found = {
        model: (min(own[index] for own in held), max(own[index] for own in held))
        for index, model in enumerate(models if held else ())
    }
    equal = all(abs(value - 1) < _EQUAL for span in found.values() for value in span)
    return {} if equal else found


def worst(records: Sequence[Record], models: Sequence[str], method: str) -> list[Worst]:
    """The weights and models that lose most by a method, the worst first.

    By how much they add to what a model loses: of a weight that hardly moved little is at stake.
    """
    found = list(_losses(records, models, method))
    return sorted(found, key=lambda entry: -entry.adds)


def _losses(records: Sequence[Record], models: Sequence[str], method: str) -> Iterator[Worst]:
    matrices = decomposed(records)
    if method not in methods_of(matrices):
        return
    entries = [(record["tensor"], entry_of(record, method)) for record in matrices]
    for index, model in enumerate(models):
        total = math.fsum(entry["own"][index] for _, entry in entries)
        for name, entry in entries:
            if own := entry["own"][index]:
                kept, lost = entry["kept"][index], entry["lost"][index]
                yield Worst(name, model, kept, lost, lost * own / total)


def unmeasured(records: Iterable[Record]) -> Iterator[str]:
    """Says which weights were not measured on the inputs, or not on those of all models."""
    matrices = [record for record in decomposed(records) if "reach" in record]
    never = [record["tensor"] for record in matrices if not any(record["reach"])]
    partly = [
        record["tensor"] for record in matrices if any(record["reach"]) and min(record["reach"]) < 1
    ]
    if never:
        yield (
            f"not measured on the inputs: {len(never):,} of {len(matrices):,} weights, whose "
            f"layers are no plain products or were not reached ({_some(never)})"
        )
    if partly:
        yield (
            f"measured on the inputs in part: {len(partly):,} of {len(matrices):,} weights, which "
            f"(or of which some experts) no example of some model reached ({_some(partly)})"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def curves(records: Sequence[Record], kind: str) -> dict[str, list[float]] | None:
    """R and I at the shares of rank `RATIOS`: means over the weights, which have other ranks.

    Those that no model moved have no curves.

    Args:
        records: of all weights.
        kind: "centred" or "from_base".

    Returns:
        None without a base.
    """
    held = [(record, record[kind]) for record in decomposed(records) if record[kind] is not None]
    found = [(record, entry) for record, entry in held if entry["energy"] > _least(record)]
    if not found:
        return None
    result: dict[str, list[float]] = {}
    for name in ("R", "I"):
        result[name] = [
            math.fsum(
                entry[name][record["ranks"].index(max(1, math.floor(ratio * record["full_rank"])))]
                for record, entry in found
            )
            / len(found)
            for ratio in RATIOS
        ]
    return result


def _least(record: Record) -> float:
    """What squared differences from an average have of rounding, where models are equal."""
    return _STILL * math.fsum(norm**2 for norm in record["norm"] or ())


def where(movement: Movement) -> str:
    """Where a model moved most, in words."""
    parts = [
        f"{name} {share:.0%}" for name, share in list(movement.modules.items())[:2] if share > 0
    ]
    if movement.depths:
        thirds = ("first", "middle", "last")
        share, third = max(zip(movement.depths, thirds, strict=True))
        if share > _OUTSTANDING:
            parts.append(f"{third} third of the layers {share:.0%}")
    return ", ".join(parts)


def title(method: str) -> str:
    """A method's name as a reader wants it."""
    return "task_arithmetic, 0.3" if method == TASK_ARITHMETIC else method
