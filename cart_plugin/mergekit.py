"""CART as the mergekit merge method ``cart``.

    models:
      - model: org/model-a
      - model: org/model-b
      - model: org/model-c
    merge_method: cart
    parameters:
      rank_ratio: 0.08
      lambda: 1.0

Every parameter takes mergekit's filters and layer gradients; ``weight`` is per model, the others
hold for all models. A base model is optional: it is the centre with ``center: base`` and is not
merged otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any, Literal

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
from pydantic import AfterValidator, BeforeValidator

from cart_plugin.errors import CartError
from cart_plugin.lowrank import RankRule
from cart_plugin.merging import CartSettings, is_decomposed, merge_tensors


def _number_named(name: str) -> BeforeValidator:
    """Say which parameter is not a number: mergekit's errors do not name the parameter."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            raise CartError(f"{name} must be a number, got {value!r}") from None
        if not math.isfinite(number):
            raise CartError(f"{name} must be a finite number, got {value!r}")
        return number

    return BeforeValidator(check)


def _checked_by(check: Callable[[Any], object]) -> AfterValidator:
    """Let the core's own checks reject a value while mergekit still plans the merge."""

    def validate(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return AfterValidator(validate)


def _whole(value: float | None) -> int | None:
    # Gradients interpolate, so that a rank between two layers' ranks need not be whole.
    return None if value is None else int(value)


RankRatio = Annotated[
    float | None,
    _number_named("rank_ratio"),
    _checked_by(lambda value: RankRule(rank_ratio=value)),
]
Rank = Annotated[
    float | None,
    _number_named("rank"),
    _checked_by(lambda value: RankRule(rank=int(value))),
    AfterValidator(_whole),
]
Energy = Annotated[
    float | None, _number_named("energy"), _checked_by(lambda value: RankRule(energy=value))
]
Lambda = Annotated[
    float, _number_named("lambda"), _checked_by(lambda value: CartSettings(lambda_=value))
]
Weight = Annotated[float, _number_named("weight")]

SPEC = MergeMethodSpec(
    name="cart",
    pretty_name="CART",
    reference_url="https://arxiv.org/abs/2412.12153",
    parameters=(
        ParameterSpec("rank_ratio", RankRatio, ParameterScope.SHARED, default=None),
        ParameterSpec("rank", Rank, ParameterScope.SHARED, default=None),
        ParameterSpec("energy", Energy, ParameterScope.SHARED, default=None),
        ParameterSpec("lambda", Lambda, ParameterScope.SHARED, default=1.0),
        ParameterSpec(
            "center", Literal["average", "base"], ParameterScope.SHARED, default="average"
        ),
        ParameterSpec(
            "svd",
            Annotated[str, _checked_by(lambda value: CartSettings(svd=value))],
            ParameterScope.SHARED,
            default="auto",
        ),
        ParameterSpec("seed", int, ParameterScope.SHARED, default=0),
        ParameterSpec("weight", Weight, ParameterScope.NON_BASE, default=1.0),
    ),
    contract=InputContract(base=BasePolicy.OPTIONAL),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)

# mergekit checks a recipe's inputs once under this name, or none, before it checks each tensor's.
_RECIPE_GROUP = re.compile(r".*\.slices\[\d+\]")


class CartMerge(GroupMergeMethod):
    """Merges one tensor of all models at a time; see `cart_plugin.merging`."""

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
                "cart needs at least two fine-tuned models beside the base model (three to gain "
                f"from it), got {len(tuned)}: {', '.join(tuned) or 'none'}"
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
        settings = CartSettings(
            rule=RankRule(
                rank_ratio=parameters["rank_ratio"],
                rank=parameters["rank"],
                energy=parameters["energy"],
            ),
            lambda_=parameters["lambda"],
            center=parameters["center"],
            svd=parameters["svd"],
            seed=parameters["seed"],
        )
        tuned = group.non_base
        if len(tuned) == 1:
            return tuned[0].tensor
        name = group.metadata.name
        return merge_tensors(
            [entry.tensor for entry in tuned],
            settings,
            weights=parameters["weight"].values_for(tuned),
            base=group.base.tensor if group.base is not None else None,
            name=name,
            models=[str(entry.id) for entry in tuned],
            decompose=group.metadata.vocabulary_axis is None
            and is_decomposed(name, tuned[0].tensor.shape),
        )


def register() -> None:
    """Make ``cart`` known to mergekit; again without effect.

    Raises:
        ValueError: another plugin has registered a method named ``cart``.
    """
    if not any(isinstance(method, CartMerge) for method in merge_methods.registered_methods()):
        merge_methods.register(CartMerge())
