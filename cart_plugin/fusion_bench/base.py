"""What FusionBench's CART methods share: their parameters, and how they load a pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fusion_bench import BaseAlgorithm, LazyStateDict, LightningFabricMixin
from fusion_bench.mixins import SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from torch import nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.fleet import (
    Fleet,
    check_base,
    check_lazy,
    class_of,
    shapes_of,
    state_of,
    tied_names,
)
from cart_plugin.fusion_bench.parameters import is_number
from cart_plugin.fusion_bench.selection import selection
from cart_plugin.merging.inputs import check_same_tensors, check_whole_weights
from cart_plugin.merging.settings import CartSettings

BASE = "the base model"
Weights = Mapping[str, float] | Iterable[float] | None


def as_pool(modelpool: BaseModelPool | dict[str, nn.Module]) -> BaseModelPool:
    """The pool that a method is given, or one of the models in a dictionary."""
    return modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)


def refuse_saving(method: BaseAlgorithm, reason: str) -> None:
    """Refuse to start where the program is told to save what is no merged model.

    Args:
        method: whose program it is.
        reason: why not.

    Raises:
        CartError: the program is told to.
    """
    path = getattr(method._program, "merged_model_save_path", None)
    if path is not None:
        raise CartError(f"merged_model_save_path is {path}, but {reason}: leave it out")


class CartBase(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """Parameters of all CART methods.

    Args:
        rank_ratio: share of the singular directions to keep; `CartSettings` says how many are if no
            rule is given.
        rank: their number instead.
        energy: as many as hold this share of the squared singular values instead.
        scaling_factor: scale of the sum of truncated task vectors, the paper's lambda; or ``auto``,
            where one model comes out: combined so that they interfere least, for which the pool's
            pretrained model is of use, if it has one.
        weights: a weight per model, as a mapping from names or a list in the pool's order.
        decompose: a preset or patterns, see `cart_plugin.fusion_bench.selection`.
        exclude_keys: names or patterns of parameters that are not decomposed all the same: merges
            average them, CART-Indexing keeps each model's own.
        svd: solver, one of `cart_plugin.linalg.svd.SOLVERS`.
        seed: start of the randomised solvers.
    """

    # What task vectors are measured from: `CartSettings.center`.
    center: Literal["average", "base"] | None = None
    # Whether `scaling_factor: auto` has a meaning: it does where one model comes out.
    takes_auto = False
    _config_mapping = BaseAlgorithm._config_mapping | {
        name: name
        for name in (
            *("rank_ratio", "rank", "energy", "scaling_factor"),
            *("weights", "decompose", "exclude_keys", "svd", "seed"),
        )
    }

    def __init__(
        self,
        rank_ratio: float | None = None,
        rank: int | None = None,
        energy: float | None = None,
        scaling_factor: float | Literal["auto"] = 1.0,
        weights: Weights = None,
        decompose: str | Iterable[str] = "auto",
        exclude_keys: str | Iterable[str] | None = None,
        svd: str = "auto",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rank_ratio, self.rank, self.energy = rank_ratio, rank, energy
        self.scaling_factor, self.weights, self.decompose = scaling_factor, weights, decompose
        self.exclude_keys = [exclude_keys] if isinstance(exclude_keys, str) else exclude_keys
        self.svd, self.seed = svd, seed
        if scaling_factor == "auto" and not self.takes_auto:
            raise CartError("scaling_factor must be a number here: auto makes one merged model")
        if scaling_factor != "auto" and not is_number(scaling_factor):
            expected = "a finite number" + (" or auto" if self.takes_auto else "")
            raise CartError(f"scaling_factor must be {expected}, got {scaling_factor!r}")
        _ = self.settings  # wrong parameters are told before any model is loaded

    @property
    def settings(self) -> CartSettings:
        """The core's parameters."""
        return CartSettings(
            rank_ratio=self.rank_ratio,
            rank=self.rank,
            energy=self.energy,
            lambda_=self.scaling_factor,
            center=self.center,
            svd=self.svd,
            seed=self.seed,
        )

    def check_not_saved(self) -> None:
        """Refuse to start where FusionBench 0.2.33 would fail in the end: it saves single models.

        Raises:
            CartError: the program is told to save what the method returns.
        """
        refuse_saving(self, "this method returns several models, which FusionBench cannot save")

    def decomposes_nothing(self, reason: str) -> None:
        """Refuse settings that decompose nothing.

        Raises:
            CartError: always, but for methods that have something else to do.
        """
        raise CartError(f"{reason}: CART would do nothing but average")

    def load(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> Fleet:
        """All models of a pool, and what to decompose of them.

        Raises:
            CartError: fewer than two fine-tuned models, a pretrained one that is missing where it
                is needed or of another architecture, lazy state dicts whose model is unknown or has
                other tensors, adapters beside weights, a pattern that matches nothing, or nothing
                to decompose.
        """
        pool = as_pool(modelpool)
        if len(pool.model_names) < 2:
            raise CartError(
                "CART needs at least two fine-tuned models; the pool has "
                f"{', '.join(pool.model_names) or 'none'}"
            )
        if self.center == "base" and not pool.has_pretrained:
            raise CartError(
                "task vectors around the pretrained model need one: give the pool a _pretrained_"
            )
        weights = _listed(self.weights, list(pool.model_names))
        with self.profile("load models"):
            models = {name: pool.load_model(name) for name in pool.model_names}
            takes_base = self.settings.takes_base and pool.has_pretrained
            base = pool.load_pretrained_model() if takes_base else None
        for model in models.values():
            if isinstance(model, LazyStateDict):
                class_of(model)
        check_lazy(models)
        states = {name: state_of(model) for name, model in models.items()}
        base_state = None if base is None else state_of(base)
        holders = dict(states)
        if base_state is not None and self.center == "base":
            holders[BASE] = base_state
        check_same_tensors(holders)
        check_whole_weights(states)
        first = next(iter(states.values()))
        tied = tied_names(next(iter(models.values())), first)
        decompose = selection(self.decompose, list(first), list(self.exclude_keys or ()), tied)
        shapes = shapes_of(next(iter(models.values())), first)
        if not any(decompose(name, shape) for name, shape in shapes.items() if name not in tied):
            self.decomposes_nothing(
                f"decompose={self.decompose!r} and exclude_keys leave none of the {len(first)} "
                "parameters to be decomposed"
            )
        if base_state is not None and self.center is None:
            check_base(base_state, shapes, decompose)
        return Fleet(
            models=models,
            states=states,
            base=base_state,
            weights=weights,
            decompose=decompose,
            shared=tied,
            device=self.fabric.device,
            keep=pool.has_instance_models,
        )


def _listed(weights: Weights, names: list[str]) -> list[float] | None:
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise CartError(f"weights are for {sorted(weights)}, the pool has {sorted(names)}")
        weights = [weights[name] for name in names]
    listed = list(weights) if isinstance(weights, Iterable) else [weights]
    listed = [weight.item() if hasattr(weight, "item") else weight for weight in listed]
    if len(listed) != len(names) or not all(is_number(weight) for weight in listed):
        raise CartError(
            f"weights must be {len(names)} numbers, in the order {', '.join(names)} or by these "
            f"names, got {weights}"
        )
    return [float(weight) for weight in listed]
