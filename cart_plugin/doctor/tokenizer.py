"""Checks of a recipe's tokenizer: what mergekit loads for it, its tokens, its chat template."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig

from cart_plugin.checkpoints.configs import parts
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.tokenizers import has_tokenizer, read_vocabulary
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.wording import some


def check_tokenizer(
    config: Recipe,
    made: Collection[str],
    checkpoints: Mapping[str, Checkpoint] | None,
    *,
    completed: bool,
) -> Iterator[Finding]:
    """Check what the recipe says of tokenizers; weight files have none.

    Args:
        config: the recipe.
        made: names of models that are made by other recipes of the file.
        checkpoints: the inputs by label; None if not all could be read.
        completed: `mergekit-cart merge` does it, which without a base begins with the first model;
            mergekit 0.1.5 begins with any, since it keeps them in a set.
    """
    if not isinstance(config, MergeConfiguration):
        return
    yield from _check_template(config.chat_template)
    named = references(config)
    donors = list(named) if config.base_model is None else [str(config.base_model)]
    donors = donors[:1] if completed else donors
    places = [path for label in donors if (path := named[label].model.path) not in made]
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        if config.chat_template:
            yield from _check_held(
                places,
                "which chat_template is for: the result would have no tokenizer",
                "or leave chat_template out",
                are_inputs=True,
            )
        return
    ways_out = "name another source, or leave the tokenizer section out"
    yield from _check_held(
        places, "which mergekit begins with: mergekit stops", ways_out, are_inputs=True
    )
    if isinstance(source, ModelReference) and source.model.path not in (*made, *places):
        yield from _check_held(
            [source.model.path], "which the recipe names as the source: mergekit stops", ways_out
        )
    yield from _check_tokens(config, made)
    if config.tokenizer and config.tokenizer.tokens and checkpoints is not None:
        yield from _check_sources(config.tokenizer.tokens, checkpoints)
        if source == "base":
            yield from _check_added(config.tokenizer.tokens, [checkpoints[it] for it in donors])


def _check_held(
    paths: Sequence[str], what: str, ways_out: str, *, are_inputs: bool = False
) -> Iterator[Finding]:
    lacking = []
    for path in dict.fromkeys(paths):
        folder, findings = files.locate(path, "tokenizer")
        if not are_inputs:  # of which this is said anyway
            yield from findings
        if folder is not None and not has_tokenizer(folder):
            lacking.append(path)
    if lacking:
        yield problem(
            f"no tokenizer files in {some(lacking)}, {what}",
            f"save a tokenizer there (save_pretrained), {ways_out}",
        )


def _check_template(template: str | None) -> Iterator[Finding]:
    """Names of templates: mergekit logs an unknown one, and saves no tokenizer with the result."""
    if not template or template == "auto":
        return
    held = resources.files("mergekit") / "_data" / "chat_templates"
    names = sorted(file.name[: -len(".jinja")] for file in held.iterdir() if ".jinja" in file.name)
    is_text = len(template) >= 20 and "{" in template
    if template not in names and not is_text:
        yield problem(
            f"chat_template {template!r} is neither one of mergekit's nor a template: the result "
            "would have no tokenizer",
            f"take auto, {', '.join(names)}, or write the template itself (jinja)",
        )


def _check_tokens(config: MergeConfiguration, made: Collection[str]) -> Iterator[Finding]:
    """Tokens whose rows the recipe takes from models that do not have them."""
    tokens = (config.tokenizer.tokens or {}) if config.tokenizer else {}
    for token, entry in tokens.items():
        model, wanted = entry.source, token
        if isinstance(model, ModelTokenEmbedding):
            if model.token is None:
                continue  # by its number
            model, wanted = model.model, model.token
        if not isinstance(model, ModelReference) or model.model.path in made:
            continue
        held = read_vocabulary(Path(model.model.path))
        if held is not None and held.is_whole and wanted not in held.tokens.values():
            yield problem(
                f"tokenizer.tokens takes {token!r} from {model.model.path}, whose tokenizer has no "
                f"{wanted!r}: mergekit stops",
                "name a model that has it, or another `source`",
            )


def _check_sources(
    tokens: Mapping[str, TokenEmbeddingConfig], checkpoints: Mapping[str, Checkpoint]
) -> Iterator[Finding]:
    """Rows that the recipe takes from where there are none."""
    read = [read_vocabulary(checkpoint.path) for checkpoint in checkpoints.values()]
    known = [set(held.tokens.values()) for held in read if held is not None and held.is_whole]
    for token, entry in tokens.items():
        if not entry.force and all(token in held for held in known):
            continue  # then mergekit takes each model's own row
        model, row = entry.source, None
        if isinstance(model, ModelTokenEmbedding):
            model, row = model.model, model.token_id
        if model is None:
            yield problem(
                f"tokenizer.tokens names no source of {token!r}: mergekit stops", "add `source:`"
            )
        if not isinstance(model, ModelReference):
            continue
        if str(model) not in checkpoints:
            yield problem(
                f"tokenizer.tokens takes {token!r} from {model}, which the recipe does not merge: "
                "mergekit stops",
                "name one of its models",
            )
            continue
        rows = _rows(checkpoints[str(model)])
        if row is not None and not 0 <= row < rows:
            yield problem(
                f"tokenizer.tokens takes {token!r} from row {row:,} of {model}, whose embeddings "
                f"have {rows:,}: mergekit stops",
                "name a `token_id` below that, or a `token`",
            )


def _check_added(
    tokens: Mapping[str, TokenEmbeddingConfig], donors: Iterable[Checkpoint]
) -> Iterator[Finding]:
    """Tokens that `source: base` adds to the base's own tokenizer, as if the base had had them."""
    for donor in donors:
        held = read_vocabulary(donor.path)
        if held is None or not held.is_whole:
            continue
        rows = _rows(donor)
        known = {token: number for number, token in held.tokens.items() if number < rows}
        added = [token for token in tokens if token not in known]
        spare = rows - 1 - max(known.values(), default=-1)
        way_out = "write `source: union` in the tokenizer section, which asks each model"
        if beyond := added[spare:]:
            yield problem(
                f"tokenizer.tokens adds {some(map(repr, beyond))} to the tokenizer of "
                f"{donor.name}, beyond the {rows:,} rows of its embeddings: mergekit stops",
                way_out,
            )
            return
        if unasked := [token for token in added if not tokens[token].force]:
            yield warning(
                f"tokenizer.tokens adds {some(map(repr, unasked))} to the tokenizer of "
                f"{donor.name}: mergekit takes spare rows of its embeddings for theirs",
                f"{way_out}, or `force: true` at each",
            )
            return


def _rows(checkpoint: Checkpoint) -> int:
    """Rows of a model's embeddings, as mergekit reads it from the config."""
    sizes = (part.get("vocab_size") for _, part in parts(checkpoint.config))
    return next((size for size in sizes if isinstance(size, int)), sys.maxsize)
