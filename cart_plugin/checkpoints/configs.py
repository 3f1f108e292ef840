"""Where models' configs differ, as transformers reads them, and whether that changes what they do.

Weights of equal shapes may belong to different functions: other heads, another rotary base, another
activation. No weight file tells.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cart_plugin.checkpoints.names import settings
from cart_plugin.checkpoints.reading import Checkpoint


class Meaning(Enum):
    """What a config's key decides."""

    COMPUTATION = "how the weights are used"
    RECORD = "labels, training, generation; sizes, which the shapes show"
    UNKNOWN = "nothing that is known here"


@dataclass(frozen=True)
class Difference:
    """A key of which the values differ.

    Attributes:
        key: with its path: `rope_parameters.rope_theta`.
        values: by the models' names.
    """

    key: str
    values: Mapping[str, Any]

    @property
    def meaning(self) -> Meaning:
        """What it decides, by its name; a part's key goes before its whole's."""
        if _RECORD.search(self.key.rpartition(".")[2]):
            return Meaning.RECORD
        return Meaning.COMPUTATION if _COMPUTATION.search(self.key) else Meaning.UNKNOWN


_NOTHING = re.compile(
    r"^_|^(?:name_or_path|transformers_version|(?:torch_)?dtype|quantization_config|auto_map)$"
)
# By name: `output_attentions` is one, and `output_multiplier` computes. The test of it reads all of
# transformers' configs.
_RECORD = re.compile(
    r"(?<!^token_)dropout|droppath|drop_(?:path|rate)|_p?drop$|layerdrop|(?:^|_)loss(?:_|$)"
    r"|^mask_(?:time|feature)_(?:prob|length|min_masks)$|^mask_(?:index|weight|point_sample_ratio)$"
    r"|^apply_spec_augment$|^ctc_zero_infinity$|(?:^|_)initializer_|_init(?:ializer)?$"
    r"|(?:^|_)init_(?:values?|(?:xavier_)?std|scheme|floor|variance|device|codebook|mask|cell|layer)"
    r"|^gradient_checkpointing|^stop_gradient|^freeze_|^pretraining_tp$|^pruned_heads$"
    r"|^(?:input|pos_embed|moe)_jitter|^chunk_size_(?:feed_forward|lm_head)$|^mamba_chunk_size$"
    r"|^id2label$|^label2id$|^num_labels$|^problem_type$|^finetuning_task$|^task_specific_params$"
    r"|^output_(?:attentions|hidden_states|router_logits|past|scores|a3_attentions|segmentation"
    r"|auxiliary_logits|retrieved)$|^use_cache$|^return_dict|^architectures$|attn_implementation$"
    r"|token_(?:id|index)s?$|^(?:min|max)_(?:new_tokens|length)$|^do_sample$|^num_beams$"
    r"|^top_[kp]$|penalty$|^early_stopping$|^forced_decoder_ids$"
    r"|^(?:begin_)?suppress_tokens$|^is_encoder_decoder$|^prefix$"
    # The shapes and the number of tensors show these, the kinds of layers the last one.
    r"|(?:^|_)(?:vocab|hidden|intermediate)_sizes?(?:_global|_mlp|_per_layer_input)?$|embed_dim$"
    r"|ffn_dim$|^d_(?:model|ff|kv)$|^n_embd$|^n_inner$|^depths$|^n_layers?$|^layers$"
    r"|(?:^|_)(?:encoder|decoder)_layers$|(?:^|_)num_(?!kv_|first_|last_)(?:\w+_)?layers$"
    r"|^max_window_layers$"
)
_COMPUTATION = re.compile(
    r"head|rope|rotary|eps(?:ilon)?$|act(?:ivation)?(?:_fn|_function)?$|hidden_act|activation"
    r"|sliding|window|layer_types|attn_layers|attention_layers|layer_pattern|kv_shared|every_n"
    r"|(?:attention|encoder)_chunk|soft_?cap|clipping|scal(?:e|ing|ar)|multiplier|^tie_|\.tie_"
    r"|position_embedding_type|relative|causal|bidirectional|is_decoder|experts_per_tok|top_?k"
    r"|n_group|router(?!_jitter)|alibi|parallel|norm|pool|stride|dilation|patch|feature_layer"
    r"|feature_select|image_size|residual|cross_attention|gate_type|token_dropout|vision_layer$"
)


def parts(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A config and, by their paths in it, those of a composite model's parts."""
    yield path, config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            yield from parts(value, f"{path}.{key}".lstrip("."))


def differences(models: Sequence[Checkpoint]) -> list[Difference]:
    """The keys of which models' configs do not agree, defaults included.

    Names, versions and dtypes are left out: they say nothing of the model.

    Raises:
        CartError: transformers cannot read a config.
    """
    if all(model.config == models[0].config for model in models[1:]):
        return []
    read = [_read(model) for model in models]
    found = []
    for key in sorted(set().union(*read)):
        values = [config.get(key) for config in read]
        if any(value != values[0] for value in values):
            named = zip((model.name for model in models), values, strict=True)
            found.append(Difference(key, dict(named)))
    return found


def _read(model: Checkpoint) -> dict[str, Any]:
    """A config's values by their paths."""
    return dict(_flat(_plain(settings(model.path, model.name))))


def _plain(config: Any) -> dict[str, Any]:
    """A config and its parts as transformers uses them.

    Keys that a class does not know are left out, and nulls are the values that they stand for.
    """
    from transformers import PretrainedConfig

    found = config.to_dict()
    known = found
    with contextlib.suppress(Exception):  # some classes cannot do without a setting
        known = type(config)().to_dict()
    found = {key: value for key, value in found.items() if key in known}
    for key in found:
        part = getattr(config, key, None)
        if isinstance(part, PretrainedConfig):
            found[key] = _plain(part)
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and heads:
        if found.get("num_key_value_heads", 0) is None:
            found["num_key_value_heads"] = heads
        if found.get("head_dim", 0) is None and isinstance(width, int):
            found["head_dim"] = width // heads
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:  # which older files call `type`
        found["rope_parameters"] = {key: rope[key] for key in rope if key != "type"}
    return found


def _flat(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _NOTHING.search(str(key)):
            continue
        if isinstance(value, dict) and value and not _RECORD.search(str(key)):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
