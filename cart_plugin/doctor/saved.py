"""Checks of what mergekit saves beside the weights: config, tokenizer, processors.

All of it comes from one input, whatever the merge made of the weights, and not all of its files are
copied. That one is the base model; without one it is any, since mergekit keeps the models in a set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.agreement import left_quantisation
from cart_plugin.checkpoints.files import read_json
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.side_files import GENERATION, belongings, side_files
from cart_plugin.doctor import numbering
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.doctor.merges import Merge
from cart_plugin.errors import CartError
from cart_plugin.wording import some

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
_HEADS = ("lm_head.weight", "embed_out.weight")
_CODE = ("modeling_", "configuration_", "tokenization_", "processing_", "image_processing_")
_PROCESSORS = {
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "normalizer.json", GENERATION),
}


def check_saved(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    *,
    completed: bool,
) -> list[Finding]:
    """Compare what a result will say of itself with what it will hold.

    Args:
        merges: its tensors, each with at least one input.
        checkpoints: the inputs by label.
        config: the recipe; those of mergekit-pytorch save weights only.
        completed: `mergekit-cart merge` corrects the config and copies what mergekit leaves behind.
    """
    if not isinstance(config, MergeConfiguration):
        return []
    donors = [
        checkpoint
        for label, checkpoint in checkpoints.items()
        if config.base_model is None or label == str(config.base_model)
    ]
    tokens = list(_check_tokens(merges, checkpoints, donors, config))
    numbers = numbering.check(merges, checkpoints, donors, config, completed=completed)
    if completed:
        return [*tokens, *numbers]
    return [
        *_check_dtype(merges, donors, config),
        *_check_quantised(donors),
        *_check_tied(merges, checkpoints, donors),
        *tokens,
        *numbers,
        *_check_files(checkpoints, donors, config, renumbered=bool(numbers)),
    ]


def _check_dtype(
    merges: Sequence[Merge], donors: Sequence[Checkpoint], config: MergeConfiguration
) -> Iterator[Finding]:
    """Report a config that names another dtype than the weights will have."""
    if config.dtype or config.out_dtype:
        return
    floating = [merge for merge in merges if merge.is_floating]
    dtypes = [{info.dtype for info in merge.inputs.values() if info.dtype} for merge in floating]
    if all(len(found) == 1 for found in dtypes):
        return  # then the config is as true as the inputs' own
    saved = {reduce(torch.promote_types, found) for found in dtypes}
    kinds = sorted(str(dtype).removeprefix("torch.") for dtype in saved)
    for donor in donors:
        named = donor.config.get("dtype") or donor.config.get("torch_dtype")
        if isinstance(named, str) and named not in kinds:
            yield warning(
                f"the weights will be saved as {', '.join(kinds)}, to which the inputs promote, "
                f"with a config that says {named} ({_origin(donor, donors)}); who loads them by it "
                f"gets {named}",
                f"write `dtype: {named}` or `dtype: {kinds[0]}` in the recipe",
            )
            return


def _check_quantised(donors: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Report a config that calls the weights quantised, which they are not."""
    donor = next((donor for donor in donors if left_quantisation(donor)), None)
    if donor is not None:
        yield warning(
            "the weights will be saved as they are, with a config that has a quantization_config "
            f"({_origin(donor, donors)}); who loads them is asked for its library, or for scales",
            'delete "quantization_config" in the config.json of the result, or merge with '
            "`mergekit-cart merge RECIPE OUT`, which does it",
        )


def _origin(donor: Checkpoint, donors: Sequence[Checkpoint]) -> str:
    if len(donors) == 1:
        return f"of model {donor.name}"
    return f"of model {donor.name} or another: without base_model mergekit takes any"


def _check_tied(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], donors: Sequence[Checkpoint]
) -> Iterator[Finding]:
    """Report a config that ties the embeddings although the result has a head of its own."""
    heads = [merge for merge in merges if merge.planned.name.endswith(_HEADS)]
    if not heads:
        return
    untied = [label for label in heads[0].tuned if not _is_tied(checkpoints[label])]
    donor = next((donor for donor in donors if _is_tied(donor)), None)
    if untied and donor is not None:
        yield warning(
            f"{heads[0].planned.name} comes from {some(untied)}, and the config "
            f"({_origin(donor, donors)}) ties it to the embeddings: programs that go by the config "
            "take those in its place",
            'set "tie_word_embeddings": false in the config.json of the result, or merge with '
            "`mergekit-cart merge RECIPE OUT`, which does it",
        )


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether a model's head is its embeddings: its config's word, or its class's default."""
    try:
        settings = names.settings(checkpoint.path, checkpoint.name)
    except CartError:
        return checkpoint.config.get("tie_word_embeddings") is True
    return getattr(settings, "tie_word_embeddings", False) is True


def _check_tokens(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    donors: Sequence[Checkpoint],
    config: MergeConfiguration,
) -> Iterator[Finding]:
    """Report tokenizers with ids beyond the embedding's rows."""
    tables = [merge for merge in merges if merge.planned.vocabulary_axis == 0]
    tokenizers = {}
    for label, checkpoint in checkpoints.items():
        counts = [merge.inputs[label].shape[0] for merge in tables if label in merge.inputs]
        found = _read_tokenizer(checkpoint.path)
        if counts and found is not None:
            tokenizers[label] = (min(counts), *found)
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    for label, (rows, ids, kind) in tokenizers.items():
        beyond = {token for token, number in ids.items() if number >= rows}
        if not beyond:
            continue
        last = max(ids.values())
        fact = (
            f"model {label}: its tokenizer has ids up to {last:,} and its embeddings {rows:,} rows"
        )
        advice = (
            f"load it with transformers, resize_token_embeddings({last + 1}) and save it again, or "
            "take the tokenizer of the model that it was trained from"
        )
        # mergekit leaves such a token out, but for these three cases, which it does not foresee.
        stops = (
            str(source) == label
            or (kind != "BPE" and label in [donor.name for donor in donors])
            or (
                # The base's own tokenizer is read without such tokens.
                [donor.name for donor in donors] != [label]
                and any(
                    others[token] < count
                    for other, (count, others, _) in tokenizers.items()
                    if other != label
                    for token in beyond & others.keys()
                )
            )
        )
        if source is None:
            yield warning(f"{fact}; such a token stops the model, and will stop the result", advice)
        elif stops:
            yield problem(f"{fact}; mergekit stops when it aligns them", advice)
        else:
            yield warning(f"{fact}; mergekit leaves such tokens out", advice)


def _read_tokenizer(folder: Path) -> tuple[dict[str, int], str] | None:
    """The ids of a tokenizer by token, and its kind; None without a tokenizer.json."""
    try:
        found = read_json(folder / "tokenizer.json")
        vocabulary = found["model"]["vocab"]
        if isinstance(vocabulary, list):  # pairs of a piece and its score
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        ids = {str(token): int(number) for token, number in {**vocabulary, **added}.items()}
        return (ids, str(found["model"].get("type"))) if ids else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # mergekit and transformers say so themselves


def _check_files(
    checkpoints: Mapping[str, Checkpoint],
    donors: Sequence[Checkpoint],
    config: MergeConfiguration,
    *,
    renumbered: bool,
) -> Iterator[Finding]:
    """Report files of the inputs that belong to the model and will not be in the result."""
    kept = [_kept(donor, config) for donor in donors]
    surely, perhaps = set.intersection(*kept), set.union(*kept)
    left: dict[tuple[str, str], list[str]] = defaultdict(list)
    seen = set(surely)
    # The base's are the ones to have.
    for label in sorted(checkpoints, key=lambda label: label not in [it.name for it in donors]):
        for name, file in belongings(checkpoints[label].path).items():
            if name not in seen and _matters(name, file):
                seen.add(name)
                left[label, "may" if name in perhaps else "will"].append(name)
    for (label, verb), files in left.items():
        reason = f"mergekit-yaml does not copy {'it' if len(files) == 1 else 'them'}"
        if verb == "may":
            reason = "without base_model mergekit-yaml copies from any one of the models"
        how = " (with the new tokenizer's ids)" if renumbered and GENERATION in files else ""
        yield warning(
            f"the result {verb} lack {some(files, 6)} of model {label}: {reason}",
            f"copy from there into the result{how}, or merge with `mergekit-cart merge RECIPE "
            "OUT`, which does it",
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
    if name == GENERATION:
        try:
            return not read_json(file).get("_from_model_config")
        except (OSError, ValueError, AttributeError):
            return False
    is_code = file.suffix == ".py" and name.startswith(_CODE)
    return is_code or name in _PROCESSORS or name in ("tokenizer.json", "tokenizer.model")
