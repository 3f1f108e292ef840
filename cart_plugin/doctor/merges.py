"""The tensors of a planned merge, and what the inputs hold for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.planning import PlannedTensor, source
from cart_plugin.linalg.rules import RANK_RULES, RankRule
from cart_plugin.mergekit import settings_of
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed, matrix_shape


@dataclass(frozen=True)
class Merge:
    """A planned tensor, what the inputs hold for it by label, and which of them lack it."""

    planned: PlannedTensor
    inputs: Mapping[str, TensorInfo]
    lacking: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the first input."""
        return next(iter(self.inputs.values())).shape

    @property
    def is_floating(self) -> bool:
        """Whether the tensor is merged; integer buffers are copied."""
        return all(info.is_floating for info in self.inputs.values())

    @property
    def is_decomposed(self) -> bool:
        """Whether `cart` decomposes the tensor as the recipe has it."""
        return self.can_be_decomposed and not self.rule.keeps_nothing

    @property
    def rank_share(self) -> float | None:
        """The share of the full rank that is kept, or None if that depends on the values."""
        _, m, n = matrix_shape(self.planned.name, self.shape)
        rank = self.rule.fixed_rank(m, n)
        return None if rank is None else rank / min(m, n)

    @property
    def can_be_decomposed(self) -> bool:
        """Whether the tensor is one that `cart` decomposes, as its mergekit adapter decides it."""
        return (
            self.is_floating
            and self.planned.vocabulary_axis is None
            and is_decomposed(self.planned.name, self.shape)
            and len(self.tuned) > 1
        )

    @property
    def tuned(self) -> list[str]:
        """The inputs that are merged: those that hold the tensor, but the base model."""
        return [label for label in self.inputs if label != self.planned.base]

    @property
    def counting(self) -> list[str]:
        """The merged inputs whose weight for this tensor is not 0."""
        return [label for label in self.tuned if self.planned.weights.get(label, 1.0) != 0]

    @property
    def takes_base(self) -> bool:
        """Whether the base model has a part in the result."""
        return self.has_base and self._settings.takes_base

    @property
    def _settings(self) -> CartSettings:
        return settings_of(self.planned.parameters)

    @property
    def has_base(self) -> bool:
        """Whether the base model holds the tensor."""
        return self.planned.base in self.inputs

    @property
    def is_auto(self) -> bool:
        """Whether there is no lambda to set."""
        return self._settings.lambda_ == "auto"

    @property
    def is_around_base(self) -> bool:
        """Whether differences are taken from the base model."""
        return self._settings.center == "base"

    @property
    def _is_informed(self) -> bool:
        return self.has_base and self._settings.is_informed(len(self.counting))

    @property
    def looks_for_low_rank(self) -> bool:
        """Whether `cart_auto` merges so many models around their average, by what made them."""
        return self._settings.looks_for_low_rank(len(self.counting))

    @property
    def rule(self) -> RankRule:
        """The rank rule for this tensor: the recipe's, or the method's own."""
        return (self._settings.informed if self._is_informed else self._settings).rule

    @property
    def rank_rules(self) -> dict[str, Any]:
        """The rank rules that the recipe sets for this tensor; one or none, if it is right."""
        given = {name: self.planned.parameters[name] for name in RANK_RULES}
        return {name: value for name, value in given.items() if value is not None}


def match(plan: Sequence[PlannedTensor], checkpoints: Mapping[str, Checkpoint]) -> list[Merge]:
    """Find the tensors of a plan in its inputs."""
    merges = []
    for planned in plan:
        found = {label: source(planned, checkpoints[label]) for label in planned.sources}
        held = {label: info for label, info in found.items() if info is not None}
        merges.append(Merge(planned, held, [label for label in found if label not in held]))
    return merges


def vocabulary_rows(merges: Sequence[Merge]) -> int | None:
    """How many tokens all inputs have a row for; None if that cannot be told."""
    counts = [
        info.shape[axis]
        for merge in merges
        if (axis := merge.planned.vocabulary_axis) is not None
        for info in merge.inputs.values()
        if axis < len(info.shape)
    ]
    return min(counts, default=None)
