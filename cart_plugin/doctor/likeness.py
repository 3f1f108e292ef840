"""Checks that models of equal shapes mean the same by their weights: tokens, and configs.

mergekit looks at neither: rows of different tokens are averaged, and the result gets the config and
the tokenizer of one of the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints import configs, names, tokenizers
from cart_plugin.checkpoints.configs import Difference, Meaning
from cart_plugin.checkpoints.headers import StoredTensor
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.tokenizers import Vocabulary
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe
from cart_plugin.errors import CartError
from cart_plugin.wording import some


def check(
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    rows: int | None = None,
    *,
    aligns: bool = False,
    completed: bool = False,
) -> list[Finding]:
    """Compare the models of a recipe for `mergekit-yaml`; weight files have nothing to compare.

    Args:
        checkpoints: the inputs by label.
        config: the recipe.
        rows: of the merged embeddings; tokens beyond them have nothing to average. None if no
            plan tells: then as many as the models' configs say.
        aligns: mergekit can merge the models, and so align their tokenizers.
        completed: `mergekit-cart merge` does it, which merges tied heads with those of their own.
    """
    if not isinstance(config, MergeConfiguration):
        return []
    models = list(checkpoints.values())
    findings = list(_check_configs(models, completed))
    if not (config.tokenizer or config.tokenizer_source):
        findings += _check_tokens(models, _rows(models) if rows is None else rows, aligns)
    return findings


def _rows(models: Sequence[Checkpoint]) -> int | None:
    """How many tokens all models have a row for, by their configs."""
    counts = []
    for model in models:
        try:
            text = names.settings(model.path, model.name).get_text_config()
        except (CartError, ValueError):  # its own code, or a text model on either side
            continue
        if isinstance(rows := getattr(text, "vocab_size", None), int):
            counts.append(rows)
    return min(counts, default=None)


def _check_configs(models: Sequence[Checkpoint], completed: bool) -> Iterator[Finding]:
    if len({model.model_type for model in models}) > 1:
        return  # another architecture: the plan tells
    try:
        found = configs.differences(models)
        if completed:
            found = [entry for entry in found if not _is_merged(entry, models)]
    except CartError:  # a model with its own code; what mergekit cannot read either stops it
        return
    differing = [entry for entry in found if entry.meaning is Meaning.COMPUTATION]
    unknown = [entry for entry in found if entry.meaning is Meaning.UNKNOWN]
    if differing:
        yield problem(
            f"the models' configs use equal weights differently: {_listed(differing)}",
            "merge models that agree in it: the result gets one model's config, under which the "
            "others' weights are wrong. If a config.json is wrong, correct it",
        )
    if unknown:
        yield warning(
            f"the models' configs differ: {_listed(unknown)}",
            "make sure that it does not matter: the result gets one model's config",
        )


def _is_merged(entry: Difference, models: Sequence[Checkpoint]) -> bool:
    """Whether models differ by heads of their own only, which are merged with the tied ones.

    A head in the file of a model that is tied contradicts its config: either may be wrong.
    """
    tied = [model for model in models if entry.values[model.name] is True]
    return entry.key.endswith("tie_word_embeddings") and not any(map(_has_head, tied))


def _has_head(model: Checkpoint) -> bool:
    built = names.meta_model(model.path, model.config, model.name)
    for same in names.tied_names(built).values():
        held = [name for name in same if name in model.tensors]
        if len(held) < 2:
            continue
        if not all(isinstance(model.tensors[name], StoredTensor) for name in held):
            return True  # not to be read here
        first, *others = map(model.read, held)
        if not all(torch.equal(first, other) for other in others):
            return True
    return False


def _listed(found: Sequence[Difference]) -> str:
    texts = []
    for entry in found:
        held: dict[str, list[str]] = {}
        for name, value in entry.values.items():
            held.setdefault(str(value), []).append(name)
        values = ", ".join(f"{value} in {some(who, 1)}" for value, who in held.items())
        texts.append(f"{entry.key} is {values}")
    more = f"; also {some(entry.key for entry in found[2:])}" if found[2:] else ""
    return "; ".join(texts[:2]) + more


def _check_tokens(
    models: Sequence[Checkpoint], limit: int | None, aligns: bool
) -> Iterator[Finding]:
    first, *others = models
    held = {first.name: tokenizers.read_vocabulary(first.path)}
    for model in others:
        same = tokenizers.are_same_files(first.path, model.path)
        held[model.name] = held[first.name] if same else tokenizers.read_vocabulary(model.path)
    known = {name: vocabulary for name, vocabulary in held.items() if vocabulary is not None}
    if len({id(vocabulary) for vocabulary in known.values()}) < 2:
        return
    rows: dict[int, dict[str, list[str]]] = {}
    for name, vocabulary in known.items():
        for number, token in vocabulary.tokens.items():
            if limit is None or number < limit:
                rows.setdefault(number, {}).setdefault(token, []).append(name)
    unlike = {number: found for number, found in sorted(rows.items()) if len(found) > 1}
    advice = "merge models of one tokenizer: the tensors' rows cannot be aligned here"
    if aligns:
        advice = (
            "add `tokenizer: {source: union}` to the recipe, which aligns the rows by their tokens "
            "and writes a tokenizer that has them all"
        )
    if unlike:
        texts = [f"{number} is {_tokens(found)}" for number, found in unlike.items()]
        yield problem(
            "the models' tokenizers have different tokens at the same ids, whose rows would be "
            f"averaged: {'; '.join(texts[:2])}"
            + (f"; and {len(texts) - 2:,} more ids" if len(texts) > 2 else ""),
            advice,
        )
        return
    partly = {number: found for number, found in rows.items() if _lack(number, known)}
    if partly:
        number, found = min(partly.items())
        yield warning(
            f"{len(partly):,} of the models' tokens are not in all of their tokenizers: {number} "
            f"is {_tokens(found)} and nothing in {some(_lack(number, known), 1)}, whose row there "
            "was never trained",
            advice,
        )


def _tokens(found: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{token!r} in {some(names, 1)}" for token, names in found.items())


def _lack(number: int, known: Mapping[str, Vocabulary]) -> list[str]:
    return [name for name, held in known.items() if held.is_whole and number not in held.tokens]
