"""A model of which each weight is a centre and what tasks add to it, by factors that adapt.

A merged weight is ``centre + sum_t c_t * V_t``, with one coefficient a task, or one a task and
parameter (AdaMerging, arXiv 2310.02575). Where ``V_t`` is low-rank it stays as factors, and may
have a mask over its singular directions, ``V_t = sum_i b_ti s_ti u_ti v_ti^T`` (AdaRank, arXiv
2503.22178): only the merged weight is ever dense.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cart_plugin.fusion_bench.fleet import aliases
from cart_plugin.linalg.precision import full_precision
from cart_plugin.merging.directions import Directions
from cart_plugin.merging.inputs import check_range

GRANULARITIES = ("layer", "task")
# Between what a mask starts with: 1 for a direction that the merge keeps, 0 for the others.
_THRESHOLD = 0.5


class Term(nn.Module):
    """One weight of all tasks.

    Args:
        centre: of the weight's shape, in the dtype to compute in.
        dtype: the model's.
    """

    centre: Tensor

    def __init__(self, centre: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("centre", centre, persistent=False)
        self.dtype = dtype

    def forward(self, coefficients: Tensor) -> Tensor:
        """The merged weight, for one coefficient a task: on the centre's device."""
        added = self.added(coefficients.to(self.centre))
        return (self.centre + added.view(self.centre.shape)).to(self.dtype)

    @abstractmethod
    def added(self, coefficients: Tensor) -> Tensor:
        """What tasks add to the centre, with as many entries."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """Norms by task, ``(tasks,)`` in fp64 on the CPU: they tell other models from these."""


class Whole(Term):
    """Task vectors that are kept as they are.

    Args:
        centre: as of `Term`.
        vectors: one a task, each of the weight's shape.
        dtype: as of `Term`.
    """

    vectors: Tensor

    def __init__(self, centre: Tensor, vectors: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__(centre, dtype)
        self.register_buffer("vectors", torch.stack(list(vectors)), persistent=False)

    def added(self, coefficients: Tensor) -> Tensor:
        """The weighted sum of the task vectors."""
        with full_precision(self.vectors.device):
            return coefficients @ self.rows.to(coefficients.dtype)

    @property
    def rows(self) -> Tensor:
        """The task vectors as rows, ``(tasks, entries)``."""
        return self.vectors.reshape(len(self.vectors), -1)

    def sizes(self) -> Tensor:
        """Frobenius norms of the task vectors."""
        return _norm(self.rows, dim=1)


class LowRankTerm(Term):
    """Low-rank task vectors as factors, side by side.

    Args:
        found: centre and factors.
        dtype: as of `Term`.
        masked: whether a mask says which directions have a part; else all do.
    """

    left: Tensor  # (stack, m, K), for K the sum of the ranks
    values: Tensor  # (stack, K)
    right: Tensor  # (stack, K, n)
    tasks: Tensor  # (K,): whose direction it is
    kept: Tensor  # (stack, K): what the merge keeps before anything is adapted

    def __init__(self, found: Directions, dtype: torch.dtype, *, masked: bool) -> None:
        super().__init__(found.centre, dtype)
        self.ranks = [factors.rank for factors in found.factors]
        ranks = torch.tensor(self.ranks)
        tensors = {
            "left": torch.cat([factors.U for factors in found.factors], dim=-1),
            "values": torch.cat([factors.S for factors in found.factors], dim=-1),
            "right": torch.cat([factors.Vh for factors in found.factors], dim=-2),
            "tasks": torch.arange(len(ranks)).repeat_interleave(ranks).to(found.centre.device),
            "kept": torch.cat(list(found.kept), dim=-1),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.scores: nn.Parameter | None = None
        if masked:
            self.scores = nn.Parameter(self.kept.to(self.values.dtype))

    @property
    def mask(self) -> Tensor:
        """Which directions have a part, ``(stack, K)``."""
        return self.kept if self.scores is None else self.scores > _THRESHOLD

    def added(self, coefficients: Tensor) -> Tensor:
        """The weighted sum of the directions that the mask lets through.

        The mask is a step, whose gradient is zero: scores get that of the mask itself
        (straight-through).
        """
        scale = self.values * coefficients[self.tasks]
        if self.scores is not None:
            scale = scale * (self.mask + (self.scores - self.scores.detach()))
        with full_precision(self.left.device):
            return (self.left * scale[..., None, :]) @ self.right

    def counts(self, directions: Tensor) -> list[int]:
        """How many of some directions each task has; of a stack all matrices' together.

        Args:
            directions: bool, ``(stack, K)``, such as `mask`.
        """
        return [int(one.sum()) for one in directions.split(self.ranks, dim=-1)]

    def sizes(self) -> Tensor:
        """Norms of the singular values by task."""
        return torch.stack([_norm(one) for one in self.values.split(self.ranks, dim=-1)])


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # it has no fp64
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64).cpu()


class Merged(nn.Module):
    """A model that runs with merged weights, whose coefficients and masks adapt.

    Args:
        model: holds what has no term, and becomes the merged model in the end.
        terms: by the names of the model's parameters.
        start: the coefficients' first values, one a task.
        by: one of `GRANULARITIES`.

    Attributes:
        names: the parameters that have terms, in the model's order, which is that of saved
            coefficients.
        merge_weight: the coefficients, ``(tasks, parameters)`` or ``(tasks,)``.
        sizes: norms of centres (first row) and task vectors, ``(1 + tasks, parameters)``.
    """

    def __init__(
        self, model: nn.Module, terms: Mapping[str, Term], start: Sequence[float], by: str
    ) -> None:
        super().__init__()
        self._trainable = [one for one in model.parameters() if one.requires_grad]
        self.model = model.requires_grad_(False)
        self.names = [name for name, _ in model.named_parameters() if name in terms]
        self._terms = nn.ModuleList(terms[name] for name in self.names)
        coefficients = torch.tensor(list(start), dtype=torch.float32)
        if by == "layer":
            coefficients = coefficients[:, None].repeat(1, len(self.names))
        self.merge_weight = nn.Parameter(coefficients)
        # FusionBench 0.2.33's own wrappers merge the first name of a tied parameter only.
        self._tied = aliases(model)
        self._held: dict[str, Tensor] | None = None
        # They do not adapt: what is saved after hours depends on no further computation.
        columns = [torch.cat([_norm(terms[n].centre)[None], terms[n].sizes()]) for n in self.names]
        self.sizes = torch.stack(columns, dim=1)

    @property
    def terms(self) -> dict[str, Term]:
        """By the parameters' names."""
        return dict(zip(self.names, self._terms, strict=True))  # type: ignore[arg-type]

    @property
    def masked(self) -> dict[str, LowRankTerm]:
        """The terms that have a mask."""
        found = self.terms.items()
        return {
            name: term
            for name, term in found
            if isinstance(term, LowRankTerm) and term.scores is not None
        }

    def weights(self) -> dict[str, Tensor]:
        """The merged weights as coefficients and masks are now."""
        by_name: Tensor = self.merge_weight
        if by_name.ndim == 1:
            by_name = by_name[:, None].expand(-1, len(self.names))
        columns = zip(self.names, self._terms, by_name.unbind(dim=1), strict=True)
        return {name: term(column) for name, term, column in columns}

    def hold(self, weights: Mapping[str, Tensor] | None) -> None:
        """Run with these weights until others come; with None, merge for each forward pass."""
        self._held = None if weights is None else dict(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass, with the merged weights."""
        weights = dict(self._held or self.weights())
        weights |= {name: weights[first] for name, first in self._tied.items() if first in weights}
        return functional_call(self.model, weights, args, kwargs, tie_weights=True, strict=False)

    @torch.no_grad()
    def unload(self) -> nn.Module:
        """The model with the merged weights in it.

        Raises:
            CartError: weights that their dtype cannot hold.
        """
        for name, weight in self.weights().items():
            check_range(weight, f"tensor {name!r}", ", a lower lr or a smaller scaling_factor")
            self.model.get_parameter(name).copy_(weight)
        for one in self._trainable:
            one.requires_grad_()
        return self.model
