"""Recipes that take layers from several places: what mergekit gets wrong of them.

What comes after the layers it merges from as many of the last slice's models as the first slice has
(`MergePlanner.plan_module` in 0.1.5). And it sets the number of layers in the result's config
(`_model_out_config`), and leaves lists such as `layer_types` as one model has them. transformers
refuses to save such a config, when all is merged; of another order, it is saved without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from mergekit.architecture import ModelArchitecture, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.options import MergeOptions

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.layout import Recipe, references

# An entry a layer; `no_rope_layers` too, whose entries are 0 and 1.
_LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attention_layers"),
    *("no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "intermediate_size"),
    *("num_attention_heads_per_layer", "num_key_value_heads_per_layer"),
)
_INDICES = ("moe_layers", "full_attn_idxs", "rope_scaling_layers")  # the numbers of some layers


@dataclass(frozen=True)
class LayerList:
    """A list of a config that the slices make another one.

    Attributes:
        section: where in the config, empty for its top.
        key: its name.
        donor: the value that mergekit leaves.
        own: what the slices' layers are.
    """

    section: str
    key: str
    donor: list[Any]
    own: list[Any]

    def write(self, config: Any) -> None:
        """Give it to a config of transformers."""
        setattr(_section(config, self.section), self.key, self.own)


def layer_lists(
    config: MergeConfiguration,
    architecture: ModelArchitecture,
    read: Callable[[ModelReference], Any],
) -> Iterator[LayerList]:
    """The lists that mergekit gets wrong for a recipe's slices.

    Args:
        config: the recipe.
        architecture: as mergekit knows it.
        read: gives a model's config as transformers reads it.
    """
    found: dict[str, Any] = {}

    def section(model: ModelReference, path: str) -> Any:
        if str(model) not in found:
            found[str(model)] = read(model)
        return _section(found[str(model)], path)

    donor = config.base_model or next(iter(references(config).values()))
    for name, module in architecture.modules.items():
        key = module.architecture.num_layers_config_key()
        slices = _slices(config, name)
        if not slices or not key:
            continue
        path, _, counter = key.rpartition(".")
        own = section(donor, path)
        layers = [  # as mergekit counts them, by the first source
            (section(piece.sources[0].model, path), number)
            for piece in slices
            for number in range(*piece.sources[0].layer_range)
        ]
        for entry in (*_LISTS, *_INDICES):
            donors: Any = getattr(own, entry, None)
            held = [donors, *(getattr(kind, entry, None) for kind, _ in layers)]
            if not all(isinstance(value, list | tuple) for value in held):
                continue
            if entry in _INDICES:
                made = [at for at, (kind, n) in enumerate(layers) if n in getattr(kind, entry)]
            elif len(donors) == getattr(own, counter, None):
                made = [getattr(kind, entry)[n] for kind, n in layers]
            else:
                continue
            if made != list(donors):
                yield LayerList(path, entry, list(donors), made)


def check(checkpoints: Mapping[str, Checkpoint], config: Recipe) -> list[Finding]:
    """Find slices of which mergekit's result or its config is wrong, or cannot be saved."""
    if not isinstance(config, MergeConfiguration):
        return []
    for slices in (config.slices, *(module.slices for module in (config.modules or {}).values())):
        if slices and (short := _short(slices)):
            return [short]
    try:
        architecture = get_architecture_info(config, MergeOptions(quiet=True))
        found = list(
            layer_lists(
                config,
                architecture,
                lambda model: names.settings(checkpoints[str(model)].path, str(model)),
            )
        )
    except Exception:  # the plan, or the model itself, tells
        return []
    if not found:
        return []
    entry = found[0]
    advice = "merge with `mergekit-cart merge RECIPE OUT`, which writes those of the slices' layers"
    if entry.key in _INDICES or len(entry.own) == len(entry.donor):
        return [
            problem(
                f"the config of the result will say {entry.key} {entry.donor}, as one model has "
                f"it, and the slices' layers are {entry.own}",
                advice,
            )
        ]
    return [
        problem(
            f"the slices make {len(entry.own)} layers, and mergekit keeps {entry.key} of "
            f"{len(entry.donor)} in the config, at which transformers stops when all is merged",
            advice,
        )
    ]


def _short(slices: Sequence[OutputSliceDefinition]) -> Finding | None:
    first, last = (len(piece.sources) for piece in (slices[0], slices[-1]))
    if first >= last:
        return None
    kept = ", ".join(str(source.model) for source in slices[-1].sources[:first])
    return problem(
        f"the last slice has {last} sources and the first one {first}: mergekit would make what "
        f"comes after the layers (the last norm, the head) of {kept} alone",
        "give the first slice as many sources, such as the others with a weight of 0",
    )


def _slices(config: MergeConfiguration, module: str) -> list[OutputSliceDefinition]:
    if config.modules and module in config.modules:
        return config.modules[module].slices or []
    return config.slices or []


def _section(config: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), config) if path else config
