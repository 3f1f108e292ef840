"""What a model can be fed, guessed from its forward's parameters and its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_TOKENS = 8
_FRAMES = 64
_WAVE = 4000  # samples: a few frames of any feature encoder


def candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments of a model's forward, the fullest first; which of them it takes only it can say.

    Args:
        model: one of transformers, or a part of one that is a `PreTrainedModel` itself.
    """
    wanted = inspect.signature(model.forward).parameters
    config = model.config
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    known: dict[str, list[Tensor]] = {}
    ids = _tokens(model)
    if ids is not None:
        known |= {"input_ids": [ids], "decoder_input_ids": [ids]}
    known["pixel_values"] = [_noise(shape, kind) for shape in _images(config)]
    for name, shapes in (("input_features", _spectra(config)), ("input_values", _sounds(config))):
        known[name] = [_noise(shape, kind) for shape in shapes]
    if "grid_thw" in wanted and "hidden_states" in wanted:
        # The vision towers of Qwen2-VL and its successors take patches that are cut already.
        known |= _patches(config, kind)
    usable = {name: values for name, values in known.items() if name in wanted and values}
    main = model.main_input_name
    if main == "input_ids":
        usable.pop("input_features", None)
    for names in dict.fromkeys(
        tuple(name for name in usable if name in chosen)
        for chosen in (
            usable,
            {main, "decoder_input_ids"},
            {main},
            *({name} for name in usable),
        )
    ):
        if not names:
            continue
        longest = max(len(usable[name]) for name in names)
        for turn in range(longest):
            yield {name: usable[name][min(turn, len(usable[name]) - 1)] for name in names}


def _noise(shape: Sequence[int], kind: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1)).to(kind)


def _tokens(model: Any) -> Tensor | None:
    """Tokens that stand for themselves: no padding, no images; the last one ends the text."""
    try:
        count = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # models of no text, and pairs of towers
        counts = _settings(model.config, "vocab_size")
        if "input_ids" not in inspect.signature(model.forward).parameters or not counts:
            return None
        count = counts[0]
    special: set[int] = set()
    for config in configs_of(model.config):
        for key, value in vars(config).items():
            if "token" in key and not isinstance(value, bool):
                several = value if isinstance(value, list | tuple) else [value]
                special.update(entry for entry in several if isinstance(entry, int))
    plain = [number for number in range(min(count, 256)) if number not in special]
    if not plain:
        return None
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(2))
    ids = torch.tensor(plain)[order[torch.arange(_TOKENS) % len(plain)]]
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < count:
        ids[-1] = end  # by which some classifiers find the last token
    return ids[None]


def configs_of(config: Any) -> list[Any]:
    """A config and those of its parts."""
    from transformers import PretrainedConfig

    found = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found += configs_of(value)
    return found


def _settings(config: Any, *names: str) -> list[Any]:
    """What a config and its parts say under any of these names."""
    found = (getattr(part, name, None) for name in names for part in configs_of(config))
    return [value for value in found if value is not None]


def _images(config: Any) -> Iterator[tuple[int, ...]]:
    channels = next(iter(_settings(config, "num_channels", "in_channels", "in_chans")), 3)
    for size in [*_settings(config, "image_size", "input_size")[:1], 64, 224]:
        sides = list(size.values()) if isinstance(size, dict) else size
        height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)[-2:]
        yield 1, channels, height, width


def _spectra(config: Any) -> Iterator[tuple[int, ...]]:
    """Spectrograms, with the time last as in Whisper or first as elsewhere."""
    sizes = _settings(
        config,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_feature_size",
    )
    for bins in sizes[:2]:
        for positions in _settings(config, "max_source_positions")[:1]:
            yield 1, bins, 2 * positions
        yield 1, _FRAMES, bins
        yield 1, bins, _FRAMES


def _sounds(config: Any) -> Iterator[tuple[int, ...]]:
    yield 1, _WAVE
    bins, length = (_settings(config, name)[:1] for name in ("num_mel_bins", "max_length"))
    if bins and length:
        yield 1, length[0], bins[0]


def _patches(config: Any, kind: torch.dtype) -> dict[str, list[Tensor]]:
    side = 2 * getattr(config, "spatial_merge_size", 1)
    numbers = getattr(config, "patch_size", 1) ** 2 * getattr(config, "temporal_patch_size", 1)
    channels = next(iter(_settings(config, "in_channels", "in_chans", "num_channels")), 3)
    return {
        "hidden_states": [_noise((side * side, numbers * channels), kind)],
        "grid_thw": [torch.tensor([[1, side, side]])],
    }
