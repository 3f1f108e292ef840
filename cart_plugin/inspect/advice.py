"""Which method and rank fit the models, why, and the recipe's lines to copy."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cart_plugin.inspect.merges import AUTO, AUTO_WITH_BASE, AVERAGE, CART, MERGED
from cart_plugin.inspect.sources import Named
from cart_plugin.inspect.summary import Judgement, Movement, Pair, title
from cart_plugin.inspect.weighting import Weighting
from cart_plugin.merging.informed import MOST_INFORMED

_NAMES = {AVERAGE: "linear", AUTO_WITH_BASE: AUTO}  # mergekit's
_ALIKE = 0.3  # difference of two models, relative to what they moved: one is nearly the other
_GAIN = 0.02  # of what is lost: less than that is no reason for another method than the average
_LITTLE = 0.5  # kept of a model: below, a merge is hardly that model
_STRANGE = 0.5  # moved, of a model's weights: fine-tuning does not; to another model it is 1.4
_FAR = 0.1  # the same, where all models moved nearly alike: then the base is another one
_SAME = 0.7  # cosine of all pairs, which then is more than siblings' changes have
_COMMON = 0.4  # cosine of all pairs: of siblings' changes, from one of them, it is a half
_LARGE = 3.0  # how much farther one model moved than the median


@dataclass(frozen=True)
class Hints:
    """How a tool's users do what advice asks for.

    Attributes:
        base: name the base model.
        judge: judge two merges.
        keep: keep all models.
    """

    base: str
    judge: str
    keep: str


_MERGEKIT = Hints("(--base)", "(`mergekit-cart compare`)", "`mergekit-cart compress` keeps each")
_FUSION_BENCH = Hints(
    "(_pretrained_ in the pool)",
    "(with their taskpool)",
    "`fusion_bench method=cart/indexing` keeps each",
)
_METHODS = {AVERAGE: "simple_average", CART: "cart"}  # FusionBench's; others are cart/auto


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Attributes:
        method: by the names of `cart_plugin.inspect.weights`.
        recipe: lines to copy: a recipe of mergekit, or a command.
        reasons: of the choice, and what else there is to know.
    """

    method: str
    recipe: str
    reasons: Sequence[str]


def advise(
    movements: Sequence[Movement],
    pairs: Sequence[Pair],
    judged: Mapping[str, Judgement],
    paths: Sequence[str],
    base: str | None,
    *,
    of_adapters: bool,
    of_pool: bool = False,
    weighting: Weighting | None = None,
) -> Advice:
    """Choose a method by what it loses: `cart_auto`, unless the average loses as little.

    That is the method whose merges were the most accurate, or level with those, wherever this
    project has measured them (``benchmarks``); with the base model where it takes it into account.

    Args:
        movements: one a model.
        pairs: the nearest first.
        judged: what each method keeps.
        paths: the models', as they are written.
        base: the base's, if there is one.
        of_adapters: the models are adapters, from which one adapter can be made.
        of_pool: they are of a pool of FusionBench, whose command is told in place of a recipe.
        weighting: how much each model counts, unless all count alike.
    """
    hints = _FUSION_BENCH if of_pool else _MERGEKIT
    methods = {name: found for name, found in judged.items() if name != MERGED}
    method = least_loss({name: found.mean_lost for name, found in methods.items()})
    is_low = all(movement.rank is not None for movement in movements)
    reasons = [
        *_choice(method, methods, len(movements), base, hints, of_adapters=of_adapters),
        *_others(method, methods, hints, is_low=is_low),
        *_ranks(movements),
        *(
            _strangers(movements, pairs, base, hints)
            or (*_pairs(pairs), *_common(pairs, base, hints))
        ),
        *_sizes(movements),
    ]
    with_bases = [named.path and named.adapter for named in map(Named.parse, paths)]
    alone = of_adapters and not any(with_bases)
    if of_pool:
        chosen = _METHODS.get(method, "cart/auto")
        recipe = f"fusion_bench method={chosen}  # and this run's modelpool and taskpool"
    elif alone:
        recipe = _command(method, paths, weighting)
        reasons += _unlike_tensors(weighting)
    else:
        recipe = _recipe(method, paths, base, weighting)
    return Advice(method, recipe, reasons)


def least_loss(lost: Mapping[str, float]) -> str:
    """The method that is recommended: `cart_auto`, unless the average loses about as little.

    Args:
        lost: by method, what it loses of the models' own answers, the mean over models.
    """
    method = _preferred(lost)
    return method if lost and lost[AVERAGE] - lost[method] >= _GAIN else AVERAGE


def _preferred(methods: Collection[str]) -> str:
    return next((name for name in (AUTO_WITH_BASE, AUTO, CART) if name in methods), AVERAGE)


def _choice(
    method: str,
    methods: Mapping[str, Judgement],
    count: int,
    base: str | None,
    hints: Hints,
    *,
    of_adapters: bool,
) -> Iterator[str]:
    if not methods:
        yield "none of the weights that moved is one that methods decompose: all of them average"
        return
    found, average = methods[method], methods[AVERAGE]
    centred = base is None and not of_adapters
    if method == AVERAGE:
        kept = "" if centred else f", which keeps {average.mean_kept:.0%}"
        preferred = _preferred(methods)
        if preferred != AVERAGE and _ahead(method, methods):
            yield f"{title(preferred)} does not lose clearly less than the average{kept}"
        elif preferred != AVERAGE or (count == 2 and base is None):
            yield f"no method loses clearly less than the average{kept}"
        else:
            yield f"of the methods that can be recommended the average is left{kept}"
    elif centred:  # of that the average has nothing: a figure would look measured
        yield (
            f"{title(method)} keeps {found.mean_kept:.0%} of what sets the models apart from their "
            f"average, and loses {found.mean_lost:.0%}; the average itself keeps none of it"
        )
    else:
        yield (
            f"{title(method)} keeps {found.mean_kept:.0%} of the changes and loses "
            f"{found.mean_lost:.0%}; the average keeps {average.mean_kept:.0%} and loses "
            f"{average.mean_lost:.0%}"
        )
    has_auto = not methods.keys().isdisjoint((AUTO, AUTO_WITH_BASE))
    if not has_auto and (count > 2 or base is not None):
        yield "a weight is below 0, which cart_auto does not take: it is left out"
    elif centred and count <= MOST_INFORMED:
        yield (
            f"with the base model {hints.base} up to {MOST_INFORMED} models can be merged by "
            "cart_auto with it, which loses less"
        )
    elif count > MOST_INFORMED and method == AUTO:
        yield f"more than {MOST_INFORMED} models are merged by cart_auto around their average"
    if count == 2:
        yield (
            "two models around their average are the average, whatever the method"
            + ("" if centred else ": cart, and cart_auto without the base, are no others")
        )
    # Around their average it keeps nothing of any models.
    says_little = centred and method == AVERAGE
    if not says_little and (found.mean_kept < _LITTLE or found.least_kept < _LITTLE / 2):
        yield (
            f"no merge keeps most of all models: {hints.keep} of them, as one base and small "
            "differences"
        )


def _others(
    method: str, methods: Mapping[str, Judgement], hints: Hints, *, is_low: bool
) -> Iterator[str]:
    """What the measure has ahead of the choice."""
    ahead = _ahead(method, methods)
    if not ahead:
        return
    best = min(ahead, key=lambda name: methods[name].mean_lost)
    yield f"{title(best)} loses less by this measure ({methods[best].mean_lost:.0%})" + (
        ", but the rows of LoRA are drawn at random and tell little of the inputs: judge both "
        f"{hints.judge}"
        if is_low
        else f": judge both {hints.judge}"
    )


def _ahead(method: str, methods: Mapping[str, Judgement]) -> list[str]:
    """The methods that lose clearly less than one."""
    if not methods:
        return []
    own = methods[method].mean_lost
    return [name for name, found in methods.items() if found.mean_lost <= own - _GAIN]


def _ranks(movements: Sequence[Movement]) -> Iterator[str]:
    ranks = [movement.rank for movement in movements]
    low = sorted({rank for rank in ranks if rank is not None})
    if low and None not in ranks:
        text = str(low[0]) if len(low) == 1 else f"{low[0]} to {low[-1]}"
        yield (
            f"the changes are of rank {text}, as of LoRA adapters: give cart no rank_ratio, which "
            "would keep all of them, and that is the average"
        )


def _strangers(
    movements: Sequence[Movement], pairs: Sequence[Pair], base: str | None, hints: Hints
) -> list[str]:
    """Says that models differ by more than fine-tuning explains.

    Then pairs tell nothing: from what is no base of theirs all models move alike.
    """
    least = min((pair.cosine for pair in pairs), default=0.0)
    most = _FAR if base is not None and least >= _SAME else _STRANGE
    found = [one for one in movements if one.share is not None and one.share > most]
    if not found:
        return []
    named = ", ".join(f"{one.model} by {one.share:.0%}" for one in found)
    if base is None:
        doubt = "models of different origins cannot be merged"
    else:
        doubt = f"if {base} is not the model that they were fine-tuned from, name that {hints.base}"
    return [
        f"{named} of the weights: fine-tuning moves a few per cent, and nothing that is said here "
        f"holds of models that have nothing in common; {doubt}"
    ]


def _pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        if pair.apart < _ALIKE:
            one, other = pair.models
            yield (
                f"{one} and {other} differ by {pair.apart:.0%} of what they moved: they count "
                "twice; leave one out, or give each half the weight"
            )


def _common(pairs: Sequence[Pair], base: str | None, hints: Hints) -> Iterator[str]:
    """Says that all models share much of what they moved: they may come from another model.

    From a sibling that was fine-tuned from the same base, the others' changes hold its own, turned
    round; of equal norms their cosine is a half.
    """
    least = min((pair.cosine for pair in pairs), default=0.0)
    if base is not None and least >= _COMMON and pairs[0].apart >= _ALIKE:
        yield (
            f"all models moved from {base} in part alike (cosine {least:.2f} at least): if they "
            f"were fine-tuned from another model, or from one in between, name that {hints.base}, "
            "for a merge takes what they share as something that each has learnt"
        )


def _sizes(movements: Sequence[Movement]) -> Iterator[str]:
    moved = sorted(movement.moved for movement in movements)
    median = moved[(len(moved) - 1) // 2]
    for movement in movements:
        if median > 0 and movement.moved > _LARGE * median:
            yield (
                f"{movement.model} moved {movement.moved / median:.1f} times as far as the others: "
                "it outweighs them in sums, unless its weight is smaller"
            )
        elif movement.moved == 0:
            yield f"{movement.model} did not move: leave it out"


def _recipe(
    method: str, paths: Sequence[str], base: str | None, weighting: Weighting | None
) -> str:
    written = [None] * len(paths) if weighting is None else weighting.written
    common = None if weighting is None else weighting.common
    models: list[dict[str, object]] = [
        {"model": _written(path)} | ({} if weight is None else {"parameters": {"weight": weight}})
        for path, weight in zip(paths, written, strict=True)
    ]
    recipe: dict[str, object] = {"models": models, "merge_method": _NAMES.get(method, method)}
    if common is not None or method == AVERAGE:  # which has no default
        recipe["parameters"] = {"weight": 1.0 if common is None else common}
    if base is not None and method == AUTO_WITH_BASE:
        recipe["base_model"] = _written(base)
    text: str = yaml.safe_dump(recipe, sort_keys=False)
    return text.rstrip()


def _written(model: str) -> object:
    """As mergekit has to read it: it takes `models/math` for a name on the hub, offline, too.

    A folder with a sign in its name that would split it is written as a mapping.
    """
    named = Named.parse(model)
    parts = {
        key: f"./{part}" if not part.startswith((".", "/", "~")) and Path(part).is_dir() else part
        for key, part in (("model", named.path), ("lora", named.adapter))
        if part is not None
    }
    if not any(_is_split(part) for part in parts.values()):
        return "+".join(parts.values())
    return {key: {"path": part} if _is_split(part) else part for key, part in parts.items()}


def _is_split(part: str) -> bool:
    return any(sign in part for sign in "+@") and Path(part).exists()


def _command(method: str, paths: Sequence[str], weighting: Weighting | None) -> str:
    chosen = {AVERAGE: "linear", CART: "cart"}.get(method, "auto")
    options = [*paths, "--method", chosen]
    if (weights := _numbers(weighting)) is not None:
        options += ["--weights", ",".join(map(str, weights))]
    return shlex.join(["mergekit-cart", "merge-adapters", *options, "--out", "merged"])


def _numbers(weighting: Weighting | None) -> list[float] | None:
    """One weight a model, if that is all; None for others, and for none."""
    if weighting is None:
        return None
    common = 1.0 if weighting.common is None else weighting.common
    found = [common if weight is None else weight for weight in weighting.written]
    return found if all(isinstance(weight, int | float) for weight in found) else None


def _unlike_tensors(weighting: Weighting | None) -> Iterator[str]:
    if weighting is not None and _numbers(weighting) is None:
        yield "`merge-adapters` takes one weight an adapter, not the recipe's for each tensor"
