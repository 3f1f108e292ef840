"""Checks of what mergekit saves beside the weights: config, tokenizer, processors.

All of it comes from one input, the base model or else the first, whatever the merge made of the
weights; and not all of its files are copied.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.side_files import side_files
from cart_plugin.doctor.findings import Finding, problem, some, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.doctor.result import Merge
from cart_plugin.errors import CartError

# What mergekit 0.1.5 copies of a tokenizer that it does not make anew (`_copy_tokenizer`).
_COPIED = {
    *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("added_tokens.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
    *("chat_template.json", "video_preprocessor_config.json"),
}
# What transformers writes when it saves a tokenizer, as mergekit lets it where it made one.
_RESAVED = {
    *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja"),
}
_GENERATION = "generation_config.json"
_PROCESSORS = {
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "normalizer.json", _GENERATION),
}


def check_saved(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> list[Finding]:
    """Compare what a result will say of itself with what it will hold.

    Args:
        merges: its tensors, each with at least one input.
        checkpoints: the inputs by label.
        config: the recipe; those of mergekit-pytorch save weights only.
    """
    if not isinstance(config, MergeConfiguration):
        return []
    donor = str(config.base_model or config.referenced_models()[0])
    return [
        *_check_dtype(merges, checkpoints[donor], config),
        *_check_tied(merges, checkpoints[donor]),
        *_check_tokens(merges, checkpoints, config),
        *_check_files(checkpoints, donor, config),
    ]


def _check_dtype(
    merges: Sequence[Merge], donor: Checkpoint, config: MergeConfiguration
) -> Iterator[Finding]:
    """Report a config that names another dtype than the weights will have."""
    if config.dtype or config.out_dtype:
        return
    named = donor.config.get("dtype") or donor.config.get("torch_dtype")
    saved = {
        reduce(torch.promote_types, [info.dtype for info in merge.inputs.values() if info.dtype])
        for merge in merges
        if merge.is_floating and any(len(info.shape) > 1 for info in merge.inputs.values())
    }
    try:
        wanted = dtype_from_name(named) if isinstance(named, str) else None
    except RuntimeError:
        return
    if wanted is None or not saved or saved == {wanted}:
        return
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in saved))
    yield warning(
        f"the weights will be saved as {kinds}, to which the inputs promote, with a config that "
        f"says {named} (of model {donor.name}); who loads them by it gets {named}",
        f"write `dtype: {named}` or `dtype: {kinds.split(', ')[0]}` in the recipe",
    )


def _check_tied(merges: Sequence[Merge], donor: Checkpoint) -> Iterator[Finding]:
    """Report a config that ties the embeddings although the result has a head of its own."""
    if not names_tied(donor.config):
        return
    for merge in merges:
        heads = [label for label in merge.tuned if label != donor.name]
        if (
            merge.planned.name.endswith("lm_head.weight")
            and merge.planned.name not in donor.tensors
            and heads
        ):
            yield problem(
                f"{merge.planned.name} comes from {some(heads)} and the config from model "
                f"{donor.name}, which says tie_word_embeddings: true: whoever loads the result "
                "gets the embeddings in its place",
                'set "tie_word_embeddings": false in the config.json of the result, or leave '
                "`base_model` out and name an untied model first",
            )


def names_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the embeddings, by its own word or its text part's."""
    text = config.get("text_config")
    return any(
        isinstance(part, dict) and part.get("tie_word_embeddings") is True
        for part in (config, text)
    )


def _check_tokens(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: MergeConfiguration
) -> Iterator[Finding]:
    """Report tokenizers with ids beyond the embedding's rows."""
    tables = [merge for merge in merges if merge.planned.vocabulary_axis == 0]
    aligned = config.tokenizer is not None or config.tokenizer_source is not None
    for label, checkpoint in checkpoints.items():
        rows = min(
            (merge.inputs[label].shape[0] for merge in tables if label in merge.inputs),
            default=None,
        )
        last = highest_id(checkpoint.path)
        if rows is None or last is None or last < rows:
            continue
        fact = (
            f"model {label}: its tokenizer has ids up to {last:,} and its embeddings {rows:,} rows"
        )
        advice = (
            f"load it with transformers, resize_token_embeddings({last + 1}) and save it again, or "
            "take the tokenizer of the model that it was trained from"
        )
        if aligned:
            yield problem(f"{fact}; mergekit stops when it aligns them", advice)
        else:
            yield warning(
                f"{fact}; a text with such a token stops the model, and the result", advice
            )


def highest_id(folder: Path) -> int | None:
    """The last id of a tokenizer by its files; None where they do not say."""
    ids: list[int] = []
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = found["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            ids += vocabulary.values()
        else:  # pairs of a piece and its score
            ids.append(len(vocabulary) - 1)
        ids += [token["id"] for token in found.get("added_tokens") or ()]
        return max((number for number in ids if isinstance(number, int)), default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_files(
    checkpoints: Mapping[str, Checkpoint], donor: str, config: MergeConfiguration
) -> Iterator[Finding]:
    """Report files of the inputs that belong to the model and will not be in the result."""
    kept = _kept(checkpoints[donor], config)
    left: dict[str, list[str]] = defaultdict(list)
    seen = set(kept)
    for label in sorted(checkpoints, key=lambda label: label != donor):
        for name, file in side_files(checkpoints[label].path).items():
            if name not in seen and _matters(name, file):
                seen.add(name)
                left[label].append(name)
    for label, files in left.items():
        yield warning(
            f"the result will lack {some(files, 6)} of model {label}: mergekit-yaml does not copy "
            f"{'it' if len(files) == 1 else 'them'}",
            "copy from there into the result, or merge with `mergekit-cart merge RECIPE OUT`, "
            "which does it",
        )


def _kept(donor: Checkpoint, config: MergeConfiguration) -> set[str]:
    """Names of the side files that mergekit gives the result."""
    own = set(side_files(donor.path))
    fused = any(model.lora for label, model in references(config).items() if label == donor.name)
    made = config.tokenizer is not None or config.tokenizer_source is not None
    is_whole = "tokenizer_config.json" in own and own & {"tokenizer.json", "tokenizer.model"}
    kept = _RESAVED if made or fused or config.chat_template or not is_whole else _COPIED
    if not made and not own & _RESAVED:
        kept = set()  # nothing to load: mergekit goes on without
    try:
        info = arch_info_for_config(names.settings(donor.path, donor.name))
    except (CartError, RuntimeError):
        info = None
    along = set((info.tagalong_files if info is not None else None) or ())
    return {name for name in kept if made or name in own} | (set() if fused else along & own)


def _matters(name: str, file: Path) -> bool:
    """Whether a model is not the same without a file: notes and second copies do not count."""
    if name == _GENERATION:
        try:
            return not json.loads(file.read_text(encoding="utf-8")).get("_from_model_config")
        except (OSError, ValueError, AttributeError):
            return False
    return (
        name in _PROCESSORS or name in ("tokenizer.json", "tokenizer.model") or file.suffix == ".py"
    )
