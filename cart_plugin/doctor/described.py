"""Checks of configs against their weights: a result has one of the models' configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints.placement import contradiction
from cart_plugin.checkpoints.reading import CONFIG, Checkpoint
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.layout import Recipe
from cart_plugin.wording import count, some

_ADVICE = f"correct its {CONFIG}, or copy or download the model again"


def check(
    checkpoints: Mapping[str, Checkpoint], config: Recipe, *, completed: bool
) -> Iterator[Finding]:
    """Report models whose config, which the result gets, describes another one.

    Args:
        checkpoints: the inputs by label.
        config: the recipe; weight files have no config.
        completed: `mergekit-cart merge` does it: without a base model the first one gives its
            config; of mergekit, any one.
    """
    if not isinstance(config, MergeConfiguration):
        return
    labels = list(checkpoints) if config.base_model is None else [str(config.base_model)]
    for label in labels[:1] if completed else labels:
        found = contradiction(checkpoints[label])
        fact = f"model {label} is not what its config describes"
        if found.shapes:
            name, (stored, described) = next(iter(found.shapes.items()))
            more = f"; also {some(list(found.shapes)[1:])}" if len(found.shapes) > 1 else ""
            yield problem(f"{fact}: {name} is {stored} and should be {described}{more}", _ADVICE)
        elif (
            found.lacking
            and config.models  # of slices, mergekit counts the layers anew
            # What others have is not the config's fault, and the plan's to tell.
            and not any(name in it.tensors for it in checkpoints.values() for name in found.lacking)
        ):
            yield problem(
                f"{fact}: it lacks {count(len(found.lacking), 'tensor')} that it has in other "
                f"layers ({some(found.lacking)})",
                _ADVICE,
            )
