"""What the doctor has to say of a merge tensor by tensor, which no plan of mergekit's describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergekit import merge_methods

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.names import vocabulary_names
from cart_plugin.doctor import likeness, whole
from cart_plugin.doctor.effects import check_effects
from cart_plugin.doctor.findings import Finding, Level
from cart_plugin.doctor.merges import Merge, vocabulary_rows
from cart_plugin.doctor.parameters import is_cart
from cart_plugin.doctor.planning import PlannedTensor
from cart_plugin.doctor.silent import check_range
from cart_plugin.execution.inputs import Inputs
from cart_plugin.execution.layout import Placed
from cart_plugin.execution.settings import Settings


def check(inputs: Inputs, merges: Sequence[Merge]) -> list[Finding]:
    """What is to be known before a merge tensor by tensor; its tensors by `foresee`."""
    config, method = inputs.config, merge_methods.get(inputs.config.merge_method)
    findings = [
        *check_range(merges, inputs.checkpoints, config),
        *likeness.check(inputs.checkpoints, config, vocabulary_rows(merges), completed=True),
        *check_effects(merges, config, method),
    ]
    if is_cart(method) and not any(finding.level is Level.PROBLEM for finding in findings):
        findings += whole.check_rules(merges, config)
    return findings


def foresee(
    inputs: Inputs, model: Any, placed: Mapping[str, Placed], *, heads: Collection[str] = ()
) -> list[Merge]:
    """The tensors of the merge, as the doctor knows those of mergekit's plan.

    Args:
        inputs: the recipe and its models.
        model: of their config, without values.
        placed: each input's tensors under the model's names; both as `tensorwise.check` has them.
        heads: names that are written though the first model ties them: others have values of
            their own there, which headers do not tell.

    Raises:
        CartError: the recipe's method does not take such models, or lacks a parameter.
    """
    donor = placed[inputs.donor.name]
    shared_by_all = set.intersection(*(set(held.units) for held in placed.values()))
    # What the model computes anew is copied; what is tied is another name of the same tensor.
    merged = shared_by_all - donor.computed - (donor.tied.keys() - set(heads))
    names = [name for name in donor.units if name in merged]
    settings = Settings(inputs, placed, names)
    tables = vocabulary_names(model)
    merges = []
    for name in names:
        shared, per_model = settings.of(name)
        planned = PlannedTensor(
            name=settings.name(name),
            vocabulary_axis=0 if name in tables else None,
            optional=False,
            sources={label: held.units[name].sources for label, held in placed.items()},
            parameters=shared,
            weights={
                str(entry): own["weight"]
                for entry, own in per_model.items()
                if own.get("weight") is not None
            },
            base=None if settings.base is None else str(settings.base),
        )
        merges.append(Merge(planned, {it: _info(held, name) for it, held in placed.items()}, []))
    return merges


def _info(placed: Placed, name: str) -> TensorInfo:
    """Shape and dtype under the model's name; of several stored tensors, one that is no float."""
    stored = [placed.checkpoint.tensors[source] for source in placed.units[name].sources]
    first = next((info for info in stored if not info.is_floating), stored[0])
    return TensorInfo(placed.shapes.get(name, first.shape), first.dtype)
