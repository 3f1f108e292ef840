"""What FusionBench's CART methods share: their parameters, and a pool's models by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from fusion_bench import BaseAlgorithm, LazyStateDict, LightningFabricMixin
from fusion_bench.mixins import SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.utils import get_target_state_dict, load_state_dict_into_target_modules
from torch import Tensor, nn
from tqdm.auto import tqdm

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.selection import Decision, selection
from cart_plugin.merging.inputs import check_same_tensors
from cart_plugin.merging.settings import CartSettings

BASE = "the base model"
Weights = Mapping[str, float] | Iterable[float] | None


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
        exclude_keys: Iterable[str] | None = None,
        svd: str = "auto",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rank_ratio, self.rank, self.energy = rank_ratio, rank, energy
        self.scaling_factor, self.weights, self.decompose = scaling_factor, weights, decompose
        self.exclude_keys = list(exclude_keys or ())
        self.svd, self.seed = svd, seed
        if scaling_factor == "auto" and not self.takes_auto:
            raise CartError("scaling_factor must be a number here: auto makes one merged model")
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

    def load(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> Fleet:
        """All models of a pool, and what to decompose of them.

        Raises:
            CartError: fewer than two fine-tuned models, a pretrained one that is missing where it
                is needed or lacks tensors, or a pattern that matches nothing.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
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
        states = {name: _state_dict(model) for name, model in models.items()}
        base_state = None if base is None else _state_dict(base)
        holders = dict(states)
        if base_state is not None and self.center == "base":
            holders[BASE] = base_state
        check_same_tensors(holders)
        first = next(iter(states.values()))
        decompose = selection(self.decompose, list(first), self.exclude_keys)
        if base_state is not None and self.center is None:
            _check_base(base_state, first, decompose)
        return Fleet(
            models=models,
            states=states,
            base=base_state,
            weights=weights,
            decompose=decompose,
            device=self.fabric.device,
            keep=pool.has_instance_models,
        )


class Fleet:
    """The fine-tuned models of a pool as state dicts.

    Attributes:
        models: as the pool gives them: modules, or `LazyStateDict`.
        states: their tensors, by model.
        base: the pretrained model's tensors, where the method needs them.
        weights: one a model, or None.
        decompose: which tensors to decompose.
    """

    def __init__(
        self,
        models: dict[str, Any],
        states: dict[str, Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None,
        weights: list[float] | None,
        decompose: Decision,
        device: torch.device,
        keep: bool,
    ) -> None:
        self.models, self.states, self.base = models, states, base
        self.weights, self.decompose = weights, decompose
        self._device, self._keep = device, keep

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self.models)

    def tensors(self, what: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Tensor by tensor: its name, and each model's version of it on the method's device."""
        first = next(iter(self.states.values()))
        for name in tqdm(list(first), desc=what, dynamic_ncols=True):
            yield name, {model: self._moved(state, name) for model, state in self.states.items()}

    def base_tensor(self, name: str) -> Tensor | None:
        """The pretrained model's version of a tensor, where the method takes it."""
        if self.base is None or name not in self.base:
            return None
        return self._moved(self.base, name)

    def home(self, name: str) -> torch.device:
        """Where the models hold a tensor: results go back there."""
        return next(iter(self.states.values()))[name].device

    def _moved(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        return state[name].to(self._device)

    def with_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A fine-tuned model with other tensors: itself, or a copy where the pool holds it.

        Raises:
            CartError: the pool gives state dicts that know no model class.
        """
        model = self.models[name]
        if isinstance(model, LazyStateDict):
            # Files leave out tensors that are tied to others; nothing may come on top.
            module = _module_of(model)
            unknown = module.load_state_dict(dict(tensors), strict=False).unexpected_keys
            if unknown:
                listed = ", ".join(unknown[:3])
                raise CartError(f"{type(module).__name__} has no place for {listed}")
            return module
        if self._keep:
            model = copied(model)
        load_state_dict_into_target_modules(model, dict(tensors))
        return model


def _check_base(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], decompose: Decision
) -> None:
    """Refuse a pretrained model of another architecture; a head of its own does not matter."""
    needed = [name for name, tensor in tuned.items() if decompose(name, tensor.shape)]
    missing = [name for name in needed if name not in base]
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise CartError(
            f"the pool's pretrained model lacks {len(missing)} of the {len(needed)} tensors that "
            f"are decomposed: {listed}; name the one that the models were fine-tuned from, or take "
            "_pretrained_ out of the pool"
        )


def _state_dict(model: Any) -> Mapping[str, Tensor]:
    # A lazy state dict reads each tensor when it is asked for it.
    return model if isinstance(model, Mapping) else get_target_state_dict(model)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model that runs its own weights.

    FusionBench's image-classification pools put a function in the place of ``forward`` that is
    bound to the original, in copies as well.
    """
    copy = deepcopy(model)
    for name in ("forward", "original_forward"):
        vars(copy).pop(name, None)
    return copy


def _module_of(lazy: LazyStateDict) -> nn.Module:
    if lazy.meta_module_class is None:
        raise CartError(
            f"the merged weights of {lazy.checkpoint} need a model to go into: give its entry in "
            "the pool a meta_module_class, such as transformers.AutoModelForCausalLM"
        )
    # FusionBench's methods empty the meta module instead, which leaves buffers that no checkpoint
    # holds (rotary frequencies) without values.
    return lazy.meta_module_class.from_pretrained(lazy.checkpoint, dtype=lazy.dtype)


def _listed(weights: Weights, names: list[str]) -> list[float] | None:
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise CartError(f"weights are for {sorted(weights)}, the pool has {sorted(names)}")
        return [float(weights[name]) for name in names]
    return [float(weight) for weight in weights]
