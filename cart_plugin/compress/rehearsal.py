"""Whether PEFT computes with an adapter what its dense weights compute, tried before it is written.

PEFT wraps modules, and not all models call the modules that they have: some read a layer's weight
(and get the base's) or its stride (and crash), or have forwards that the wrapper does not know. So
random adapters are loaded into a small model of the same modules (`miniature`), and its answers
compared with those of the weights that `expand` would write, a kind of layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cart_plugin.compress.layers import Assignment, Structure
from cart_plugin.compress.miniature import Miniature, miniature
from cart_plugin.compress.trial import Answer, Kind, Trial
from cart_plugin.errors import CartError


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        layers: modules that PEFT's LoRA does not work for, and why.
        saved: modules that PEFT does not work with when it stores them whole, and why.
        unseen: modules of which no answer shows whether they work.
    """

    layers: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing has failed."""
        return not self.layers and not self.saved

    def add(self, kind: Kind, reason: str) -> None:
        """Enter a kind that has failed."""
        found = self.saved if kind.is_saved else self.layers
        found.update(dict.fromkeys(kind.modules, reason))


class Rehearsal:
    """A model's trials, plan after plan, and what they have found so far.

    Attributes:
        layers: modules that PEFT's LoRA does not work for, and why.
        saved: modules that PEFT does not work with when it stores them whole, and why.
        as_parameters: modules that it wraps as it wraps stacked experts instead.
    """

    def __init__(
        self,
        model: Any,
        structure: Structure,
        task_type: str | None,
        progress: Callable[[str, int, int], None],
        *,
        one_rank: bool = False,
    ) -> None:
        """Of a model from `names.meta_model`, which is not modified; arguments as of `Work`.

        ``one_rank`` says that all layers of an adapter will have one.
        """
        self._one_rank = one_rank
        self.layers: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        self.as_parameters: set[str] = set()
        self._structure = structure
        self._task_type = task_type
        self._progress = progress
        self._small = miniature(model) or Miniature(model, (), frozenset(), False)
        self._unseen: list[str] = []

    def accepts(self, assignment: Assignment) -> bool:
        """Whether a plan works; if not, what does not is known now.

        Raises:
            CartError: PEFT does not take the plan, though it takes each part of it.
        """
        trial = Trial(self._small, assignment, self._structure, self._task_type, self._one_rank)
        outcome = _rehearse(trial, self._progress)
        layers = {layer.module for layer in assignment.lora.values()}
        self._unseen = [module for module in outcome.unseen if module in layers]
        if outcome.is_clean:
            outcome = _by_class(self._structure, assignment, self._unseen)
        if any(layer.is_parameter for layer in assignment.lora.values()):
            # PEFT 0.21.2 takes `gate_proj` of a dense layer for an expert's, and knows no router's
            # forward; both work as parameters, which no model without experts has any use for.
            linear = {layer.module for layer in assignment.lora.values() if layer.kind == "linear"}
            again = outcome.layers.keys() & linear
            self.as_parameters |= again
            outcome.layers = {m: why for m, why in outcome.layers.items() if m not in again}
            if again:
                return False
        self.layers |= outcome.layers
        self.saved |= outcome.saved
        return outcome.is_clean

    def notes(self, assignment: Assignment) -> list[str]:
        """What a user has to know of the trials of a plan that works."""
        found = []
        reasons: dict[tuple[str, str], list[str]] = {}
        for module, reason in self.layers.items():
            names = self._structure.below(module)
            stored = any(name in assignment.exact for name in names)
            fate = "are stored whole" if stored else "stay at the base"
            reasons.setdefault((reason, fate), []).append(module)
        for (reason, fate), modules in reasons.items():
            found.append(
                f"{len(modules)} modules such as {modules[0]} get no LoRA but {fate}: {reason}"
            )
        if not self._small.runs:
            found.append(
                "no way was found to run a small model of this architecture: PEFT loads these "
                "adapters, but nobody has seen that it answers with them as `mergekit-cart expand` "
                "does; compare the two"
            )
        elif self._unseen:
            found.append(
                f"{len(self._unseen)} modules such as {self._unseen[0]} had no part in the trial "
                "run's answers: compare PEFT's with those of `mergekit-cart expand` where they have"
            )
        return found


def _rehearse(trial: Trial, progress: Callable[[str, int, int], None]) -> Outcome:
    """What PEFT makes of a plan, and of its parts where it makes nothing of the whole."""
    together = trial.failure(trial.kinds)
    outcome = Outcome()
    if together is None:
        for done, (kind, answer) in enumerate(trial.compared(), 1):
            progress("trying PEFT", done, len(trial.kinds))
            if answer is Answer.OTHER:
                outcome.add(kind, "with PEFT the model answers otherwise than with these weights")
            elif answer is Answer.THE_BASES:
                outcome.unseen += kind.modules
        if outcome.is_clean:
            trial.check_together()
        return outcome
    layers = [kind for kind in trial.kinds if not kind.is_saved]
    broken = _broken(trial, layers, [])
    for kind, reason in broken:
        outcome.add(kind, reason)
    failed = [kind for kind, _ in broken]
    sound = next((kind for kind in layers if kind not in failed), None)
    if sound is not None:  # PEFT wraps no model without any LoRA
        saved = [kind for kind in trial.kinds if kind.is_saved]
        for kind, reason in _broken(trial, saved, [sound]):
            outcome.add(kind, reason)
    if outcome.is_clean:
        raise CartError(f"PEFT cannot hold these adapters: {together}")
    return outcome


def _broken(trial: Trial, kinds: list[Kind], beside: list[Kind]) -> list[tuple[Kind, str]]:
    """Those of some kinds that PEFT fails with, and why: by halves, for most of them work."""
    if not kinds:
        return []
    reason = trial.failure([*kinds, *beside])
    if reason is None:
        return []
    if len(kinds) == 1:
        return [(kinds[0], reason)]
    half = len(kinds) // 2
    return _broken(trial, kinds[:half], beside) + _broken(trial, kinds[half:], beside)


def _by_class(structure: Structure, assignment: Assignment, modules: Collection[str]) -> Outcome:
    """What the classes of some LoRA layers say, where no model's answer shows it.

    A plain layer does what its forward says; of another forward, or of an owner that reads the
    weight, PEFT knows nothing.
    """
    from transformers.pytorch_utils import Conv1D

    plain = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)}
    outcome = Outcome()
    for layer in assignment.lora.values():
        if layer.module not in modules:
            continue
        owner = structure.modules.get(layer.module.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            outcome.layers[layer.module] = "nn.MultiheadAttention reads its weight past PEFT"
        elif not layer.is_parameter and type(structure.modules[layer.module]).forward not in plain:
            outcome.layers[layer.module] = "its class has a forward that PEFT does not know"
    return outcome
