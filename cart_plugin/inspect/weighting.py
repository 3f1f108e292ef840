"""How much each model counts in a merge, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cart_plugin.errors import CartError
from cart_plugin.merging.inputs import normalised


@dataclass(frozen=True)
class Weighting:
    """Weights that may differ from tensor to tensor, such as a recipe's.

    Attributes:
        of: takes the names of all tensors, and gives the weights for each, one a model.
        written: a recipe's `weight` for each model, for a recipe to copy; None where it has none.
        common: its `weight` for all models.
    """

    of: Callable[[Sequence[str]], Mapping[str, Sequence[float]]]
    written: Sequence[Any]
    common: Any = None

    @classmethod
    def constant(cls, weights: Sequence[float]) -> Weighting:
        """The same weights for all tensors."""
        return cls(lambda names: dict.fromkeys(names, weights), list(weights))

    def checked(
        self, names: Sequence[str], count: int, every: Sequence[str]
    ) -> dict[str, list[float]]:
        """The weights for some tensors, scaled to sum to 1.

        Args:
            names: of these tensors.
            count: of the models.
            every: names of all tensors of a model, with these: they tell how many layers it has.

        Raises:
            CartError: they are no numbers, of another number of models, or sum to nothing.
        """
        found = self.of(every)
        if len(self.written) != count:
            raise CartError(
                f"{count} models but {len(self.written)} weights; give one a model, in their order"
            )
        return {name: normalised(found[name], count, f"tensor {name!r}") for name in names}
