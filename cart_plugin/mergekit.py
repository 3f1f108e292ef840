"""CART as the mergekit merge methods ``cart`` and ``cart_auto``.

    models:
      - model: org/model-a
      - model: org/model-b
      - model: org/model-c
    merge_method: cart
    parameters:
      rank_ratio: 0.08
      lambda: 1.0

``cart_auto`` has no ``lambda``: it combines the truncated differences so that they interfere least
(`cart_plugin.merging.least_interference`), and needs no setting at all.

Every parameter takes mergekit's filters and layer gradients; ``weight`` is per model, the others
hold for all models. A base model is optional: it is the centre with ``center: base`` and is not
merged otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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

from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.inputs import check_finite
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed


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
            _named("center", lambda value: CartSettings(center=value).center, "a word"),
            "average",
        ),
        _shared("svd", _named("svd", lambda value: CartSettings(svd=value).svd, "a word"), "auto"),
        _shared("seed", _named("seed", _whole, "a whole number"), 0),
        ParameterSpec(
            "weight",
            _named("weight", _number, "a number"),
            ParameterScope.NON_BASE,
            default=1.0,
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


# mergekit checks a recipe's inputs once under this name, or none, before it checks each tensor's.
_RECIPE_GROUP = re.compile(r".*\.slices\[\d+\]")


class CartMerge(GroupMergeMethod):
    """Merges one tensor of all models at a time; see `cart_plugin.merging.cart`."""

    spec = SPEC

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Require two fine-tuned models of a recipe, though optional tensors may come from one."""
        of_recipe = group_name is None or bool(_RECIPE_GROUP.fullmatch(group_name))
        if not of_recipe and base_id not in input_ids:
            base_id = None  # the base lacks an optional tensor, which only center: base needs
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        tuned = [str(model) for model in input_ids if model != base_id]
        if len(tuned) < 2 and of_recipe:
            raise CartError(
                f"{self.spec.name} needs at least two fine-tuned models beside the base model "
                f"(three to gain from it), got {len(tuned)}: {', '.join(tuned) or 'none'}"
            )

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
        settings = settings_of(parameters)
        tuned, name = group.non_base, group.metadata.name
        tensors, models = [entry.tensor for entry in tuned], [str(entry.id) for entry in tuned]
        if len(tuned) == 1:
            check_finite(tensors[0], models, tensors, f"tensor {name!r}")
            return tensors[0]
        return merge_tensors(
            tensors,
            settings,
            weights=parameters["weight"].values_for(tuned),
            base=group.base.tensor if group.base is not None else None,
            name=name,
            models=models,
            decompose=group.metadata.vocabulary_axis is None
            and is_decomposed(name, tensors[0].shape),
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
