"""Checks of a recipe's tokenizer: what mergekit loads for it, its tokens, its chat template."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.tokenizer.config import ModelTokenEmbedding

from cart_plugin.checkpoints.tokenizers import has_tokenizer, read_vocabulary
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.wording import some


def check_tokenizer(config: Recipe, made: Collection[str]) -> Iterator[Finding]:
    """Check what the recipe says of tokenizers; weight files have none.

    Args:
        config: the recipe.
        made: names of models that are made by other recipes of the file.
    """
    if not isinstance(config, MergeConfiguration):
        return
    yield from _check_template(config.chat_template)
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return
    # Without a base mergekit 0.1.5 begins with one of a set of models: it may be any of them.
    donors = [config.base_model] if config.base_model else list(references(config).values())
    places = [model.model.path for model in donors if model.model.path not in made]
    yield from _check_held(places, "which mergekit begins with", are_inputs=True)
    if isinstance(source, ModelReference) and source.model.path not in (*made, *places):
        yield from _check_held([source.model.path], "which the recipe names as the source")
    yield from _check_tokens(config, made)


def _check_held(paths: Sequence[str], what: str, *, are_inputs: bool = False) -> Iterator[Finding]:
    lacking = []
    for path in dict.fromkeys(paths):
        folder, findings = files.locate(path, "tokenizer")
        if not are_inputs:  # of which this is said anyway
            yield from findings
        if folder is not None and not has_tokenizer(folder):
            lacking.append(path)
    if lacking:
        yield problem(
            f"no tokenizer files in {some(lacking)}, {what}: mergekit stops",
            "save a tokenizer there (save_pretrained), name another source, or leave the tokenizer "
            "section out",
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
