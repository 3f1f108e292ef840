"""The parameters of CART that hold for all models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import SOLVERS
from cart_plugin.merging.informed import INFORMED_RANK_RATIO, MOST_INFORMED
from cart_plugin.merging.least_interference import AUTO_RANK_RATIO

_LARGEST = torch.finfo(torch.float32).max  # sums are in fp32


@dataclass(frozen=True, kw_only=True)
class CartSettings:
    """The parameters of CART that hold for all models.

    Attributes:
        rank_ratio: share of the singular directions to keep (`RankRule`). If none is given: 0.08,
            less of differences of low numerical rank (`RankRule.of_numerical_rank`), such as those
            of adapters, of which 0.08 may be all; and 0.16 with ``lambda_="auto"``, or 0.24 where
            the base model is taken into account.
        rank: their number instead.
        energy: as many as hold this share of the squared singular values instead.
        lambda_: scale of the sum of truncated task vectors, or ``"auto"``: they are combined so
            that they interfere least (`cart_plugin.merging.least_interference.least_interference`).
        center: what differences are taken from: ``"average"``, the weighted mean of the fine-tuned
            weights, or ``"base"``, the base model (the paper's uncentred ablation). If None, it is
            the average; but with ``lambda_="auto"`` a base model that is given shows where each
            task's inputs lie (`cart_plugin.merging.informed.informed_by_base`).
        svd: solver, one of `cart_plugin.linalg.svd.SOLVERS`; ``"auto"`` is ``"subspace"`` with
            ``lambda_="auto"``, which needs no singular vectors, and ``"sketch"`` where the base
            model is taken into account.
        seed: start of the randomised solvers, mixed with each tensor's name.

    Raises:
        CartError: a value of the wrong kind or out of range, or two rank rules at once.
    """

    rank_ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    lambda_: float | Literal["auto"] = 1.0
    center: Literal["average", "base"] | None = None
    svd: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        RankRule(self.rank_ratio, self.rank, self.energy)
        number = isinstance(self.lambda_, (int, float)) and not isinstance(self.lambda_, bool)
        # Whole numbers may be larger than any float.
        if self.lambda_ != "auto" and not (number and abs(self.lambda_) <= _LARGEST):
            raise CartError(f"lambda must be a finite number or 'auto', got {self.lambda_!r:.40}")
        if self.center not in (None, "average", "base"):
            raise CartError(f"center must be 'average' or 'base', got {self.center!r}")
        if self.svd not in SOLVERS:
            raise CartError(f"svd must be one of {', '.join(SOLVERS)}, got {self.svd!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise CartError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def takes_base(self) -> bool:
        """Whether the base model, if it is given, may have a part in the result."""
        return self.center == "base" or (self.lambda_ == "auto" and self.center is None)

    def looks_for_low_rank(self, models: int) -> bool:
        """Whether so many models are merged in another way if their changes are of low rank."""
        return self.lambda_ == "auto" and self.center != "base" and models > MOST_INFORMED

    def is_informed(self, models: int) -> bool:
        """Whether it decides where the inputs of the models' tasks lie."""
        return self.lambda_ == "auto" and self.center is None and models <= MOST_INFORMED

    @property
    def informed(self) -> CartSettings:
        """The same where the base model does: with a rank rule and solver of its own."""
        ratio = self.rank_ratio if self.has_rule else INFORMED_RANK_RATIO
        return replace(self, rank_ratio=ratio, svd="sketch" if self.svd == "auto" else self.svd)

    @property
    def rule(self) -> RankRule:
        """The rank rule that is given, or the default one."""
        if self.lambda_ == "auto" or self.center == "base" or self.has_rule:
            return self.plain_rule
        # A sum of whole differences from the average is zero: some of each has to be left out.
        return replace(self.plain_rule, of_numerical_rank=True)

    @property
    def plain_rule(self) -> RankRule:
        """The same for restoring each model, which may keep all that it differs by."""
        if self.lambda_ == "auto" and not self.has_rule:
            return RankRule(AUTO_RANK_RATIO)
        return RankRule(self.rank_ratio, self.rank, self.energy)

    @property
    def has_rule(self) -> bool:
        """Whether one of ``rank_ratio``, ``rank`` and ``energy`` is given."""
        return not (self.rank_ratio is self.rank is self.energy is None)

    @property
    def solver(self) -> str:
        """The solver that `svd` stands for."""
        return "subspace" if self.lambda_ == self.svd == "auto" else self.svd
