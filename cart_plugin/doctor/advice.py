"""What to do where mergekit cannot plan a merge."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.layout import Recipe, groups
from cart_plugin.doctor.parameters import adds_base
from cart_plugin.merging.informed import MOST_INFORMED
from cart_plugin.wording import some

_MISSING = re.compile(r"Missing required parameter (?P<name>\w+) for (?P<where>.*)")
FLAT = "merge with `mergekit-cart merge RECIPE OUT`, which goes tensor by tensor where it has to"


def flat(config: Recipe) -> str:
    """How a recipe's models can be merged without mergekit's knowledge of their architecture."""
    if not isinstance(config, MergeConfiguration):
        return f"write a recipe of model folders and {FLAT}"
    first = []
    if not config.models:
        first.append("write whole models under `models:`")
    if config.tokenizer or config.tokenizer_source or config.chat_template:
        first.append("delete the tokenizer settings")
    return " and ".join([*first, FLAT])


def way_out(error: Exception, config: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """What to do about an exception of mergekit's planner."""
    message = str(error)
    if "concatenate list" in message or "get_input_embeddings" in message:
        return (
            "this mergekit cannot merge bare encoders such as BertModel or CLIPModel. Save them "
            "with a head (BertForSequenceClassification) or their parts apart (CLIPVisionModel); "
            f"or {flat(config)}"
        )
    if "allow-crimes" in message or "same number of layers" in message:
        return _without_base(config, checkpoints) or (
            "merge models of one architecture and size: compare their config.json"
        )
    if found := _MISSING.match(message):
        return _with_parameter(found["name"], found["where"], config)
    if "requires exactly" in message and _added_base(config):
        return _without_added_base(config)
    if "multiple modules" in message:
        return _with_modules(config)
    if "LoRA not merged" in message:
        return "fuse the adapters first (PEFT: merge_and_unload) and merge the resulting models"
    what = "correct what the message names"
    return what if is_of_recipe(error) else f"{what}; or {flat(config)}"


def is_of_recipe(error: Exception) -> bool:
    """Whether a method refuses the recipe's models or parameters: nothing else can merge them."""
    return str(error).startswith(("Missing required parameter ", "Merge method "))


def here(advice: str, obstacle: str) -> str:
    """Advice for those who merge with `mergekit-cart merge` already, which cannot do it either.

    Args:
        advice: the doctor's.
        obstacle: why the tensors cannot be merged one by one.
    """
    own = "" if advice == FLAT else advice.removesuffix(f"; or {FLAT}")
    if own.endswith(FLAT):  # after a step that makes it possible
        return own
    return "; ".join(filter(None, [own, f"tensor by tensor: {obstacle}"]))


def in_one_format(config: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """What to do where models of one class have other names than each other; else nothing."""
    if not are_one_class(checkpoints) or not isinstance(config, MergeConfiguration):
        return ""
    return (
        "save all models in one format (model.save_pretrained, with one save_original_format); or "
        f"{flat(config)}"
    )


def are_one_class(checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether all models have one architecture: of several, nobody can merge tensors by name."""
    return len({str(held.config.get("architectures")) for held in checkpoints.values()}) == 1


def asks_for_code(error: Exception) -> bool:
    """Whether transformers stopped at a model that brings its own code."""
    return "custom code" in str(error) or "trust_remote_code" in str(error)


def lacks_a_head(checkpoint: Checkpoint) -> bool:
    """Whether a model is a bare one (`BertModel`), which has classes with a head beside it."""
    return any(str(name).endswith("Model") for name in checkpoint.config.get("architectures") or ())


def _without_base(config: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """Advice where only the base model is of another architecture, and nothing needs it."""
    if config.base_model is None:
        return ""
    base = str(config.base_model)
    classes = {label: str(held.config.get("architectures")) for label, held in checkpoints.items()}
    tuned = {found for label, found in classes.items() if label != base}
    if len(tuned) != 1 or classes[base] in tuned:
        return ""
    what = f"only the base model is a {classes[base].strip('[]')}"
    needed = merge_methods.get(config.merge_method).spec.contract.base == BasePolicy.REQUIRED
    if needed or (config.parameters or {}).get("center") == "base":
        return f"{what}: name one of the models' own class as base, or use a method without a base"
    if config.merge_method == "cart_auto" and len(checkpoints) - 1 <= MOST_INFORMED:
        return (
            f"{what}: save it with the models' own class (its from_pretrained, then "
            "save_pretrained), or name one of that class; without a base cart_auto merges so few "
            "models worse, and of two it makes their average"
        )
    return f"{what}: leave `base_model` out, {config.merge_method} does not need it"


def _added_base(config: Recipe) -> str:
    """The base model that mergekit adds to the models; empty if it does not."""
    method = merge_methods.get(config.merge_method)
    return next((str(group.base) for group in groups(config) if adds_base(group, method)), "")


def _without_added_base(config: Recipe) -> str:
    method = config.merge_method
    return f"delete `base_model:`: {method} knows no base, and takes it for one more model"


def _with_parameter(name: str, where: str, config: Recipe) -> str:
    """Advice where a method's parameter is missing for a tensor, or for a model's."""
    base = _added_base(config)
    if base and where.startswith(f"{base}."):
        return _without_added_base(config)
    specs = merge_methods.get(config.merge_method).spec.shared_parameters
    shared = any(spec.name == name for spec in specs)
    place = "under the recipe's `parameters:`" + ("" if shared else ", or for each model")
    return f"set `{name}` {place}; of filters, the last entry goes without one"


def modules(config: Recipe) -> list[str]:
    """What mergekit calls the parts of the models' architecture; nothing if it knows it not."""
    if isinstance(config, MergeConfiguration):
        with contextlib.suppress(Exception):
            return list(get_architecture_info(config, MergeOptions(quiet=True)).modules)
    return []


def _with_modules(config: Recipe) -> str:
    """Advice for slices of a model that has several stacks of layers."""
    names = modules(config)
    form = ", ".join(f"{name}: {{slices: [...]}}" for name in names) or "NAME: {slices: [...]}"
    return (
        f"this architecture has several stacks of layers ({some(names) or 'modules'}): write the "
        f"slices of each as `modules: {{{form}}}`, or merge whole models under `models:`"
    )
