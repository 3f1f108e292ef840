"""The models of a recipe, for `mergekit-cart inspect`."""

from __future__ import annotations

from pathlib import Path

from cart_plugin.doctor import schema
from cart_plugin.doctor.layout import groups, references
from cart_plugin.doctor.recipe import load
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import stop_at


def subjects(recipe: Path, base: str | None) -> tuple[tuple[str, ...], str | None]:
    """The models that a recipe merges, in its order, and their base.

    Args:
        recipe: the YAML file, of one recipe for mergekit-yaml or mergekit-pytorch.
        base: takes the place of the recipe's base model.

    Returns:
        Models as `MODEL` or `BASE+ADAPTER`; a base model that is merged, too, is not among them.

    Raises:
        CartError: it is no recipe, several, or merges slices of layers.
    """
    documents, findings = load(recipe)
    if findings:
        raise CartError(f"{recipe}: {findings[0].fact}; {findings[0].advice}")
    if len(documents) > 1:
        raise CartError(f"{recipe} holds several recipes; inspect takes one")
    # Whatever the method, and without one, too.
    document = {"merge_method": "linear", **documents[0]}
    document.pop("name", None)
    config, findings = schema.parse(document, schema.recipe_class(document))
    stop_at(findings)
    if config is None:
        raise CartError(f"mergekit rejects {recipe}")
    merged = groups(config)
    if len(merged) != 1 or merged[0].label != "models":
        raise CartError(f"{recipe} merges slices of layers or modules; inspect takes whole models")
    named = references(config)
    own = None if config.base_model is None else str(config.base_model)
    found = tuple(
        "+".join(part.path for part in (named[label].model, named[label].lora) if part is not None)
        for label in dict.fromkeys(merged[0].models)
        if label != own
    )
    return found, base if base is not None else None if own is None else named[own].model.path
