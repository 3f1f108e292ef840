"""The models of a FusionBench pool, tensor by tensor, and the one that merged tensors go into."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from fusion_bench import LazyStateDict
from fusion_bench.models.utils import get_target_state_dict, load_state_dict_into_target_modules
from torch import Tensor, nn
from tqdm.auto import tqdm

from cart_plugin.checkpoints.names import of_any_layer
from cart_plugin.checkpoints.orientation import turned_parameters
from cart_plugin.errors import CartError, CartWarning
from cart_plugin.fusion_bench.selection import Decision
from cart_plugin.merging.inputs import check_range
from cart_plugin.wording import count, some


class Fleet:
    """The fine-tuned models of a pool as state dicts.

    Attributes:
        models: as the pool gives them: modules, or `LazyStateDict`.
        states: their tensors, by model.
        base: the pretrained model's tensors, where the method needs them.
        weights: one a model, or None.
        decompose: which tensors to decompose.
        shared: further names of tied tensors, as `tied_names` has them.
        turned: the tensors that are stored as (inputs, outputs), such as GPT-2's.

    Raises:
        CartError: the first model ties what another one has twice.
    """

    def __init__(
        self,
        models: dict[str, Any],
        states: dict[str, Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None,
        weights: list[float] | None,
        decompose: Decision,
        shared: Mapping[str, str],
        device: torch.device,
        keep: bool,
    ) -> None:
        self.models, self.states, self.base = models, states, base
        self.weights, self.decompose = weights, decompose
        self._device, self._keep = device, keep
        self.shared, self.turned = shared, turned_of(next(iter(models.values())))
        # A lazy state dict of one file fails where it is asked whether it holds another tensor.
        self._of_base = set() if base is None else set(base)
        self._check_tied()

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self.models)

    def tensors(self, what: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Tensor by tensor: its name, and each model's version of it on the method's device.

        Tied ones come once.
        """
        first = next(iter(self.states.values()))
        names = [name for name in first if name not in self.shared]
        for name in tqdm(names, desc=what, dynamic_ncols=True):
            yield name, {model: self._moved(state, name) for model, state in self.states.items()}

    def base_tensor(self, name: str) -> Tensor | None:
        """The pretrained model's version of a tensor, where the method takes it."""
        if self.base is None or name not in self._of_base:
            return None
        return self._moved(self.base, name)

    def home(self, name: str) -> torch.device:
        """Where the models hold a tensor: results go back there."""
        if isinstance(next(iter(self.models.values())), LazyStateDict):
            return torch.device("cpu")  # where `module_of` loads; to ask for it reads the tensor
        return next(iter(self.states.values()))[name].device

    def at_home(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A result where the models hold it, in a dtype of theirs.

        Raises:
            CartError: values that this dtype cannot hold.
        """
        moved = tensor.to(self.home(name), dtype)
        check_range(moved, f"tensor {name!r}")
        return moved

    def _moved(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        return state[name].to(self._device)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under all their names, in the models' order."""
        order = next(iter(self.states.values()))
        return {name: tensors[self.shared.get(name, name)] for name in order}

    def with_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A fine-tuned model with other tensors: itself, or a copy where the pool holds it.

        Raises:
            CartError: the pool gives state dicts that know no model class, or tensors that are not
                its own.
        """
        model, tensors = self.models[name], self.whole(tensors)
        if isinstance(model, LazyStateDict):
            dtype = next(one.dtype for one in tensors.values() if one.is_floating_point())
            module = module_of(model, dtype)
            _check_tensors(name, tensors, module)
            for key, place in module.state_dict().items():
                if key in tensors and tensors[key].dtype != place.dtype:
                    check_range(tensors[key].to(place.dtype), f"tensor {key!r} of {name}")
            module.load_state_dict(tensors, strict=False)  # files hold tied tensors once
            return module
        if self._keep:
            model = copied(model)
        load_state_dict_into_target_modules(model, tensors)
        return model

    def _check_tied(self) -> None:
        for name, other in self.shared.items():
            for model, state in self.states.items():
                one, two = state[name], state[other]
                if one.data_ptr() != two.data_ptr() and not torch.equal(one, two):
                    raise CartError(
                        f"{other} and {name} are one tensor in {self.names[0]}, two in {model}: "
                        f"name {model} first in the pool, so that the merged model has both"
                    )


def check_lazy(models: Mapping[str, Any]) -> None:
    """Refuse lazy state dicts that hold other tensors than their model has.

    Files may name tensors in another way than the model does that is loaded from them: those of
    mixtures have each expert on its own, which transformers 5 loads into one tensor. FusionBench
    0.2.33 leaves out of a lazy state dict what the model does not know.

    Raises:
        CartError: there are some.
    """
    for name, model in models.items():
        if isinstance(model, LazyStateDict) and model.meta_module is not None:
            if hasattr(model.meta_module, "tie_weights"):
                model.meta_module.tie_weights()  # made without weights, it has lost that
            _check_tensors(name, set(model), model.meta_module)


def _check_tensors(name: str, held: Collection[str], module: nn.Module) -> None:
    places, shared = set(module.state_dict()), aliases(module)
    known = {shared.get(one, one) for one in held}
    missing = sorted(one for one in places if shared.get(one, one) not in known)
    unknown = sorted(set(held) - places)
    if missing or unknown:
        found = [f"no {some(missing)}"] if missing else []
        found += [f"{some(unknown)} without a place there"] if unknown else []
        raise CartError(
            f"{name}, read tensor by tensor, does not hold the tensors of "
            f"{type(module).__name__}: {', and '.join(found)}; load the models whole, in a "
            "CausalLMPool without enable_lazy_loading"
        )


def check_base(base: Iterable[str], tuned: Mapping[str, torch.Size], decompose: Decision) -> None:
    """Refuse a pretrained model of another architecture; a head of its own does not matter.

    Warns of further layers: the model may be a deeper one, or have some that fine-tuning drops, as
    those that predict further tokens.

    Args:
        base: the names of its tensors.
        tuned: the shapes of the models' tensors.
        decompose: which of them are decomposed.

    Raises:
        CartError: it lacks tensors that are decomposed.
    """
    held, own = set(base), set(tuned)
    remedy = (
        "name the one that the models were fine-tuned from, or take _pretrained_ out of the pool"
    )
    needed = [name for name, shape in tuned.items() if decompose(name, shape)]
    if missing := [name for name in needed if name not in held]:
        raise CartError(
            f"the pool's pretrained model lacks {len(missing)} of the {len(needed)} tensors that "
            f"are decomposed: {some(missing)}; {remedy}"
        )
    layers = {of_any_layer(name) for name in own}
    if extra := sorted(name for name in held - own if of_any_layer(name) in layers):
        warnings.warn(
            f"the pool's pretrained model has {count(len(extra), 'tensor')} of layers that the "
            f"models have not: {some(extra)}; if it is a deeper one, {remedy}",
            CartWarning,
            stacklevel=3,
        )


def state_of(model: Any) -> Mapping[str, Tensor]:
    """The tensors of a module, or of a lazy state dict: that reads each when it is asked for it."""
    return model if isinstance(model, Mapping) else get_target_state_dict(model)


def shapes_of(model: Any, state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of a model's tensors; those of a lazy state dict are not read for them."""
    known = model.meta_module.state_dict() if isinstance(model, LazyStateDict) else state
    return {name: known[name].shape for name in state}


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model that runs its own weights.

    FusionBench's image-classification pools put a function in the place of ``forward`` that is
    bound to the original, in copies as well.
    """
    copy = deepcopy(model)
    for name in ("forward", "original_forward"):
        vars(copy).pop(name, None)
    return copy


def module_of(lazy: LazyStateDict, dtype: torch.dtype) -> nn.Module:
    """The model of a lazy state dict, with its own weights.

    Raises:
        CartError: it knows no model class.
    """
    # FusionBench's methods empty the meta module instead, which leaves buffers that no checkpoint
    # holds (rotary frequencies) without values.
    return class_of(lazy).from_pretrained(lazy.checkpoint, dtype=dtype)


def class_of(lazy: LazyStateDict) -> Any:
    """The model class of a lazy state dict.

    Raises:
        CartError: it knows none.
    """
    if lazy.meta_module_class is None:
        raise CartError(
            f"the weights of {lazy.checkpoint} need a model to go into: give its entry in the pool "
            "a meta_module_class, such as transformers.AutoModelForCausalLM"
        )
    return lazy.meta_module_class


def turned_of(model: Any) -> set[str]:
    """The tensors of a model that are stored as (inputs, outputs).

    Of a lazy state dict without a model class that is not known: there are none then.
    """
    module = model.meta_module if isinstance(model, LazyStateDict) else model
    return turned_parameters(module) if isinstance(module, nn.Module) else set()


def tied_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, str]:
    """As `aliases`, of what is in a state dict; a lazy one has no further names."""
    found, names = aliases(model) if isinstance(model, nn.Module) else {}, set(state)
    return {name: other for name, other in found.items() if {name, other} <= names}


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, with the name under which each is listed first."""
    first: dict[Tensor, str] = {}
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            shared[name] = first[parameter]
    return shared
