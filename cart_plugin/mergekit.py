"""CART as the mergekit merge methods ``cart`` and ``cart_auto``.

    models:
      - model: org/model-a
      - model: org/model-b
      - model: org/model-c
    merge_method: cart
    parameters:
      rank_ratio: 0.08
      lambda: 1.0

``cart_auto`` has no ``lambda`` and nothing to set (`cart_plugin.merging.least_interference`). Name
the ``base_model``: it shows where each task's inputs lie (`cart_plugin.merging.informed`).

Parameters take mergekit's filters and layer gradients; ``weight`` is per model. A base model is
optional, and not itself merged; ``cart`` has use for it with ``center: base`` only.
"""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from pydantic import BeforeValidator

from cart_plugin.checkpoints import agreement
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.stored import Stored
from cart_plugin.errors import CartError, CartWarning
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.inputs import check_finite, is_agreed_mask
from cart_plugin.merging.kept import Countdown, Kept
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed

REVISION = 3
"""Raised when recipes come to mean other numbers, as `cart_plugin.merging.REVISION` is."""


def _named(name: str, convert: Callable[[Any], Any], kind: str, *, optional: bool = False) -> Any:
    """Convert a recipe's value or say which parameter it is: mergekit's errors do not name it."""

    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        try:
            if value is None or isinstance(value, bool):
                raise TypeError
            return convert(value)
        except CartError:
            raise
        except OverflowError:
            raise CartError(f"{name} must be a finite number, got {value!r}") from None
        except (TypeError, ValueError):
            raise CartError(f"{name} must be {kind}, got {value!r}") from None

    return Annotated[Any, BeforeValidator(check)]


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise OverflowError
    return number


def _rank(value: Any) -> int:
    # Gradients interpolate, so that a rank between two layers' ranks need not be whole; only 0
    # itself means "average".
    number = _number(value)
    if number < 0:
        raise CartError(f"rank must be 0 or a positive whole number, got {value}")
    return 0 if number == 0 else max(1, int(number))


def _rank_ratio(value: Any) -> float | None:
    return RankRule(rank_ratio=_number(value)).rank_ratio


def _energy(value: Any) -> float | None:
    return RankRule(energy=_number(value)).energy


def _whole(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError
    return int(value)


def _shared(name: str, value_type: Any, default: Any) -> ParameterSpec:
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default=default)


_PARAMETERS = {
    spec.name: spec
    for spec in (
        _shared("rank_ratio", _named("rank_ratio", _rank_ratio, "a number", optional=True), None),
        _shared("rank", _named("rank", _rank, "a number", optional=True), None),
        _shared("energy", _named("energy", _energy, "a number", optional=True), None),
        _shared("lambda", _named("lambda", _number, "a number"), 1.0),
        _shared(
            "center",
            _named(
                "center", lambda value: CartSettings(center=value).center, "a word", optional=True
            ),
            None,
        ),
        _shared("svd", _named("svd", lambda value: CartSettings(svd=value).svd, "a word"), "auto"),
        _shared("seed", _named("seed", _whole, "a whole number"), 0),
        ParameterSpec(
            "weight",
            _named("weight", _number, "a number", optional=True),
            ParameterScope.NON_BASE,
            default=None,  # counts 1, and is told from a 1 that somebody wrote
        ),
    )
}


def _method(name: str, title: str, parameters: Iterable[ParameterSpec]) -> MergeMethodSpec:
    return MergeMethodSpec(
        name=name,
        pretty_name=title,
        reference_url="https://arxiv.org/abs/2412.12153",
        parameters=tuple(parameters),
        contract=InputContract(base=BasePolicy.OPTIONAL),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
    )


SPEC = _method("cart", "CART", _PARAMETERS.values())
AUTO_SPEC = _method(
    "cart_auto",
    "CART without hyperparameters",
    (spec for name, spec in _PARAMETERS.items() if name != "lambda"),
)


def settings_of(parameters: Mapping[str, Any]) -> CartSettings:
    """The core's settings for the parameters of ``cart`` or ``cart_auto``.

    Raises:
        CartError: they cannot be used, such as two rank rules at once.
    """
    return CartSettings(
        rank_ratio=parameters["rank_ratio"],
        rank=parameters["rank"],
        energy=parameters["energy"],
        lambda_=parameters.get("lambda", "auto"),
        center=parameters["center"],
        svd=parameters["svd"],
        seed=parameters["seed"],
    )


def _weights(models: Sequence[str], given: Sequence[float | None]) -> list[float]:
    """The models' weights: 1 where the recipe gives none, which one model alone may not expect."""
    without = [model for model, weight in zip(models, given, strict=True) if weight is None]
    if len(without) == 1 and len(given) > 2:
        warnings.warn(
            f"model {without[0]} has no `weight` while all others have; it counts 1.0. Give it "
            "one, or, if it is the base model, name it as `base_model`",
            CartWarning,
            stacklevel=3,
        )
    return [1.0 if weight is None else weight for weight in given]


def place_of(model: Any) -> tuple[str, ...]:
    """Where a model is, whichever way its path is written: of two alike, one would count twice.

    Args:
        model: a mergekit `ModelReference`.
    """

    def where(path: Any) -> str:
        # Of a local folder mergekit ignores the revision.
        return os.path.realpath(path.path) if os.path.exists(path.path) else str(path)

    return tuple(where(path) for path in (model.model, model.lora) if path is not None)


def _check_models(
    input_ids: Sequence[Hashable], base_id: Hashable | None
) -> Mapping[Any, Checkpoint]:
    """Refuse what mergekit would merge in silence, though it spoils the result.

    Returns:
        The models' headers, as far as they can be read.

    Raises:
        CartError: a model twice, quantised weights, or models named otherwise than the base.
    """
    from mergekit.common import ModelReference  # not yet whole when this file is imported
    from mergekit.io.tasks import LoaderCache

    models = [model for model in input_ids if isinstance(model, ModelReference)]
    check_places(models, base_id)
    found = {}
    for model in models:
        loader = LoaderCache().loaders.get(model)
        path = model.model.path if loader is None else loader.index.base_path
        found[model] = agreement.headers(str(model), Path(path))
    agreement.check_stored(list(found.values()))
    tuned = [found[model] for model in models if model != base_id]
    if len(tuned) < 2 or not all(checkpoint.tensors for checkpoint in found.values()):
        return found
    # Without a base, mergekit goes by the names of any of the models.
    for model in [base_id] if base_id in found else models:
        others = agreement.strangers(found[model], tuned)
        if len(tuned) - len(others) < 2 and not _is_known(model):
            example = (next(iter(found[model].tensors)), next(iter(others[0].tensors)))
            names = [other.name for other in others]
            fact = agreement.stranger_fact(str(model), names, example, is_base=model == base_id)
            raise agreement.StrangersError(*fact)
    return found


def check_places(models: Sequence[Any], base_id: Hashable | None) -> None:
    """Refuse one folder under two paths; `base_id` is the base model's reference.

    Raises:
        CartError: there is one.
    """
    seen: dict[tuple[str, ...], Any] = {}
    for model in models:
        other = seen.setdefault(place_of(model), model)
        if other is not model:
            what = "the base model counts" if base_id in (model, other) else "one model counts"
            raise CartError(
                f"{other} and {model} are one folder: {what} twice; write its path in one way, and "
                "once (`weight` makes a model count more)"
            )


def _is_known(model: Any) -> bool:
    """Whether mergekit has a list of the architecture's tensors, and stops where one is missing."""
    from mergekit.architecture import arch_info_for_config

    return os.path.isdir(model.model.path) and arch_info_for_config(model.config()) is not None


# mergekit checks the inputs of each of a recipe's slices under this name, or none where it has no
# slices, before it checks each tensor's.
_RECIPE_GROUP = re.compile(r".*\.slices\[\d+\]")


class _Planning(threading.local):
    """The numbers of fine-tuned models by slice of the recipe that this thread plans."""

    def __init__(self) -> None:
        self.slices: dict[str, int] = {}


class CartMerge(GroupMergeMethod):
    """Merges one tensor of all models at a time; see `cart_plugin.merging.cart`."""

    spec = SPEC

    def __init__(self) -> None:
        self._planning = _Planning()
        # Of all threads: one plans, others may merge. None where no recipe does.
        self._countdown: Countdown | None = None
        self._stored = Stored()

    @property
    def kept(self) -> Kept | None:
        """What the latest recipe's merge has kept so far; None before the first."""
        return None if self._countdown is None else self._countdown.kept

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Require a recipe of two fine-tuned models that can be merged.

        A slice may come from one model, whose layers it keeps, and an optional tensor, too.
        """
        of_slice = group_name is not None and bool(_RECIPE_GROUP.fullmatch(group_name))
        of_recipe = group_name is None or of_slice
        alone = of_slice and len(input_ids) == 1
        if (alone or not of_recipe) and base_id not in input_ids:
            base_id = None  # it lacks an optional tensor, or is not in this slice
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        tuned = [str(model) for model in input_ids if model != base_id]
        known = self._planning.slices
        self._planning.slices = {}
        # Whether one-model slices are all of the recipe is known when the first tensor is planned.
        nothing = not of_recipe and bool(known) and max(known.values()) < 2
        if nothing or (of_recipe and not alone and len(tuned) < 2):
            raise CartError(
                f"{self.spec.name} needs at least two fine-tuned models beside the base model, "
                f"got {len(tuned)}: {', '.join(tuned) or 'none'}"
            )
        # A name that comes again is of another recipe, after one that failed.
        before = {} if group_name in known or not of_slice else known
        if of_recipe:
            found = _check_models(input_ids, base_id)
            if not before or self._countdown is None:
                self._countdown, self._stored = Countdown(), Stored()
            self._stored.add(found)
            self._countdown.skip(agreement.unmerged(list(found.values())))
        elif self._countdown is not None:
            self._countdown.plan(str(group_name))
        if of_slice:
            self._planning.slices = {**before, str(group_name): len(tuned)}

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor.

        Args:
            group: the tensor of each model that holds it, all of one shape.
            parameters: the recipe's, resolved for this tensor.

        Returns:
            The merged tensor, in the inputs' dtype.

        Raises:
            CartError: input that cannot be merged.
        """
        countdown = self._countdown
        if countdown is None:
            return self._merged(group, parameters, None)
        merged = self._merged(group, parameters, countdown.kept)
        if text := countdown.done(str(group.metadata.name)):
            warnings.warn(text, CartWarning, stacklevel=2)
        return merged

    def _merged(
        self, group: TensorGroup, parameters: dict[str, Any], kept: Kept | None
    ) -> torch.Tensor:
        settings = settings_of(parameters)
        tuned, name = group.non_base, group.metadata.name
        tensors, models = [entry.tensor for entry in tuned], [str(entry.id) for entry in tuned]
        if is_agreed_mask(str(name), tensors):
            return tensors[0]
        if len(group.entries) == 1 or len(tuned) == 1:  # of a slice or an optional tensor
            tuned = tuned or group.entries
            tensors, models = [tuned[0].tensor], [str(tuned[0].id)]
            check_finite(tensors[0], models, tensors, f"tensor {name!r}")
            return tensors[0]
        base, shape = group.base, tensors[0].shape
        is_matrix = group.metadata.vocabulary_axis is None and is_decomposed(name, shape)
        by_inputs = is_matrix and settings.lambda_ == "auto"
        return merge_tensors(
            tensors,
            settings,
            weights=_weights(models, parameters["weight"].values_for(tuned)),
            base=None if base is None else base.tensor,
            name=name,
            models=models,
            decompose=is_matrix,
            kept=kept,
            turned=by_inputs and self._stored.is_turned(str(name), shape),
            # A recipe's dtype rounds the base, too.
            base_is_rounded=by_inputs
            and base is not None
            and self._stored.is_finer(base.id, str(name), base.tensor.dtype),
        )


class CartAutoMerge(CartMerge):
    """The same without a lambda."""

    spec = AUTO_SPEC


def register() -> None:
    """Make ``cart`` and ``cart_auto`` known to mergekit; again without effect.

    Raises:
        ValueError: another plugin has registered a method of one of these names.
    """
    known = {type(method) for method in merge_methods.registered_methods()}
    for method in (CartMerge, CartAutoMerge):
        if method not in known:
            merge_methods.register(method())
