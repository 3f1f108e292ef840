"""Where models' configs differ, as transformers reads them, and whether that changes what they do.

Weights of equal shapes may belong to different functions: other heads, another rotary base, another
activation. No weight file tells.
"""

from __future__ import annotations

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
_RECORD = re.compile(
    r"dropout|drop_?(?:path|rate|out)|_p?drop$|layerdrop|^(?:mask|apply_spec|ctc)_|aux_loss|_loss"
    r"|init(?:ializer)?_|_init$|^initializer|gradient|pretraining_tp|chunk_size|^pruned|jitter"
    r"|^id2label$|^label2id$|^num_labels$|^problem_type$|^finetuning_task$|task_specific"
    r"|^use_cache$|^output_|^return_dict|^architectures$|token_(?:id|index)s?$|attn_implementation"
    r"|^(?:min|max)_(?:new_tokens|length)$|^do_sample$|^num_beams$|^temperature$|^top_[kp]$"
    r"|penalty$|^early_stopping$|^forced_|^suppress|^begin_suppress|^is_encoder_decoder$|^prefix$"
    # The shapes and the number of tensors show these, the kinds of layers the last one.
    r"|vocab_size|hidden_size|intermediate_size|embed_dim$|ffn_dim$|^d_(?:model|ff|kv)$|^n_embd$"
    r"|^n_inner$|^depths$|(?:num_(?:\w+_)?|n_|^|encoder_|decoder_)layers?$|^max_window_layers$"
)
_COMPUTATION = re.compile(
    r"head|rope|rotary|eps(?:ilon)?$|act(?:ivation)?(?:_fn|_function)?$|hidden_act|activation"
    r"|sliding|window|layer_types|softcap|scal(?:e|ing|ar)|multiplier|^tie_|\.tie_"
    r"|position_embedding_type|relative|causal|bidirectional|is_decoder|experts_per_tok|top_?k"
    r"|n_group|router|alibi|parallel|norm|pool|stride|dilation|patch|feature_layer"
    r"|feature_select|image_size|residual|cross_attention"
)


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
    """A config's values by their paths, without the keys that its class does not know."""
    config = settings(model.path, model.name)
    found = dict(_flat(config.to_dict()))
    try:
        known = type(config)().to_dict()
    except Exception:  # some classes cannot do without a setting
        return found
    return {key: value for key, value in found.items() if key.partition(".")[0] in known}


def _flat(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _NOTHING.search(str(key)):
            continue
        if isinstance(value, dict) and value and not _RECORD.search(str(key)):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
