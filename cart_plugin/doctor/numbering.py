"""Checks of the tokens that a config names by number, against the tokenizer of the result."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints import token_ids
from cart_plugin.checkpoints.files import read_json
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.checkpoints.side_files import GENERATION
from cart_plugin.checkpoints.tokenizers import has_tokenizer, read_vocabulary
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.merges import Merge
from cart_plugin.wording import some


def check(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    donors: Sequence[Checkpoint],
    config: MergeConfiguration,
    *,
    completed: bool,
) -> list[Finding]:
    """Report ids in configs that mean another token in the result, or none.

    Args:
        merges: the result's tensors, each with at least one input.
        checkpoints: the inputs by label.
        donors: those whose config the result may have.
        config: the recipe.
        completed: `mergekit-cart merge` numbers them anew; mergekit leaves them.
    """
    if not (config.tokenizer or config.tokenizer_source):
        return []
    tables = [merge for merge in merges if merge.planned.vocabulary_axis == 0]
    rows = {
        label: min(counts)
        for label in checkpoints
        if (counts := [table.inputs[label].shape[0] for table in tables if label in table.inputs])
    }
    for donor in donors[:1] if completed else donors:
        old = _tokens(donor.path)
        new = _new_ids(donor, checkpoints, rows, config)
        if old is None or new is None or donor.name not in rows:
            continue
        size = _size(new, config)
        found = list(_check(donor, old, new, size, rows[donor.name], completed=completed))
        if found:
            return found  # without a base model all models may be donors; one is enough
    return []


def _check(
    donor: Checkpoint,
    old: Mapping[int, str],
    new: Mapping[str, int],
    size: int,
    rows: int,
    *,
    completed: bool,
) -> Iterator[Finding]:
    """Compare a donor's numbers with the result's, which has embeddings of `size` rows."""
    there = {number: token for token, number in new.items()}
    lost: list[str] = []
    beyond: list[str] = []
    others: list[str] = []
    for entry, is_kept in _entries(donor):
        for number in entry.numbers:
            token = old.get(number)
            is_same = token == there.get(number) and number < size
            if is_same or not 0 <= number < rows:  # what lies beyond its rows is wrong already
                continue
            name = f"{entry.path} {number}" + ("" if token is None else f" ({token!r})")
            if token is not None and token not in new and not entry.may_go:
                lost.append(name)
            elif number >= size and is_kept:
                beyond.append(name)
            else:
                meant = repr(there[number]) if number in there else "none"
                others.append(f"{name}, there {meant}")
    if lost:
        yield problem(
            f"the tokenizer of the result lacks what model {donor.name} cannot be without: "
            f"{_some(lost)}",
            "add such tokens (`tokenizer: {source: ..., tokens: {TOKEN: {source: MODEL}}}`), or "
            "take another source",
        )
    if completed:  # it numbers the others anew
        return
    way_out = (
        "merge with `mergekit-cart merge RECIPE OUT`, which takes the numbers of the result's "
        "tokenizer, or correct config.json there"
    )
    if beyond:
        yield problem(
            f"tokens that the config of model {donor.name} names lie beyond the {size:,} of the "
            f"result, and mergekit-yaml keeps their numbers: {_some(beyond)}",
            way_out,
        )
    if others:
        yield warning(
            f"tokens that the config of model {donor.name} names have other numbers in the "
            f"result, and mergekit-yaml keeps theirs: {_some(others)}",
            way_out,
        )


def _some(names: Sequence[str]) -> str:
    return some(dict.fromkeys(names))


def _entries(donor: Checkpoint) -> Iterator[tuple[token_ids.Entry, bool]]:
    """Those of its configs, and whether mergekit keeps them: a generation config it leaves out."""
    yield from ((entry, True) for entry in token_ids.entries(donor.config))
    try:
        held = read_json(donor.path / GENERATION)
    except (OSError, ValueError):
        return  # there is none, or nobody can read it
    yield from ((entry, False) for entry in token_ids.entries(held))


def _tokens(folder: Path) -> Mapping[int, str] | None:
    held = read_vocabulary(folder)
    return held.tokens if held is not None and held.is_whole else None


def _new_ids(
    donor: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    rows: Mapping[str, int],
    config: MergeConfiguration,
) -> dict[str, int] | None:
    """The numbers of the result's tokens, as far as they can be foreseen; None if they cannot."""
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if isinstance(source, ModelReference):
        found = _tokens(Path(source.model.path))
    else:
        found = _tokens(donor.path)
        # mergekit reads the base's tokenizer without tokens that have no row.
        found = found and {n: token for n, token in found.items() if n < rows.get(donor.name, 0)}
    if not found:
        return None
    ids = {token: number for number, token in found.items()}
    more: list[Collection[str]] = [config.tokenizer.tokens or ()] if config.tokenizer else []
    if source == "union":
        for label, other in checkpoints.items():
            if not has_tokenizer(other.path):
                continue  # mergekit takes it that it is the base's
            held = _tokens(other.path)
            if held is None:
                return None
            more.append([token for number, token in held.items() if number < rows.get(label, 0)])
    following = max(ids.values()) + 1
    for token in (token for tokens in more for token in tokens):
        if token not in ids:  # in which order they come is mergekit's whim
            ids[token] = following
            following += 1
    return ids


def _size(ids: Mapping[str, int], config: MergeConfiguration) -> int:
    """Rows of the result's embeddings."""
    multiple = (config.tokenizer.pad_to_multiple_of if config.tokenizer else None) or 1
    return -(-len(ids) // multiple) * multiple
