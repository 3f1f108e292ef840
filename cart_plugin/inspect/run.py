"""Whole models, measured a weight at a time, and reported."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cart_plugin import linalg, merging
from cart_plugin.errors import CartError
from cart_plugin.inspect import activations
from cart_plugin.inspect.inputs import Inputs
from cart_plugin.inspect.journal import Journal
from cart_plugin.inspect.measures import REVISION, Record, record
from cart_plugin.inspect.models import open_models
from cart_plugin.inspect.places import places
from cart_plugin.inspect.report import Report
from cart_plugin.inspect.sources import Named, Source
from cart_plugin.inspect.summary import unmeasured
from cart_plugin.inspect.weighting import Weighting
from cart_plugin.inspect.weights import Plain, Weight
from cart_plugin.linalg.threads import side_by_side

_AT_ONCE = 2**25
"""Numbers of all models of the weights that are in the works, unless a single one has more: a large
one keeps several threads busy by itself."""

Progress = Callable[[str, int, int], None]
"""Is told a step, how many of its tensors are done, and their number."""


def inspect_models(
    models: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    merged: str | Path | None = None,
    inputs: Sequence[str | Path] = (),
    names: Sequence[str] | None = None,
    weights: Weighting | Sequence[float] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure what fine-tuning did to the weights of models, and what a merge will lose of it.

    A tensor at a time is in memory, of all models, or a few small ones: as many as torch has
    threads. Of adapters the factors are; with their base on the disk a weight of it is, for its
    norm.

    Args:
        models: two or more: folders of whole models (or safetensors files), or of PEFT adapters,
            or ``BASE+ADAPTER``. Beside whole models adapters are taken as the whole models that
            they make.
        base: the model they were fine-tuned from; differences are from their average without it.
            That of ``BASE+ADAPTER`` if None.
        merged: a merged model, or adapter, which is judged beside the methods.
        inputs: text files (an example a line) or folders of images: one for all models, or one a
            model, in their order. The models are loaded and run on them, and what merges keep is
            measured on what their layers get, too.
        names: what to call the models; by their folders if None.
        weights: how much each model counts in merges, in their order; None for alike.
        out: folder of the report: `report.json`, `report.md` and `report.html`. Made if need be. A
            run that was cut off goes on where it stopped. None for no files.
        progress: is told how far the work is.

    Returns:
        What was found.

    Raises:
        CartError: models that cannot be read or compared; or ``out`` cannot be written, or holds
            another program's report.
    """
    started = time.perf_counter()
    named = [Named.parse(str(model)) for model in models]
    source = open_models(
        named, None if base is None else str(base), None if merged is None else str(merged), names
    )
    tell = progress or (lambda *_: None)
    examples = _examples(inputs, len(named))
    weighting = None
    if weights is not None:
        weighting = weights if isinstance(weights, Weighting) else Weighting.constant(weights)
    shares = None
    if weighting is not None:
        shares = weighting.checked(source.weights, len(named), source.every)
    subjects = source.runnable() if examples else []
    key = _key(source, subjects, examples, shares)
    with (
        nullcontext() if out is None else Journal(Path(out), key) as journal,
        TemporaryDirectory(prefix="mergekit-cart-inspect-") as scratch,
    ):
        records: dict[str, Record] = {} if journal is None else journal.records
        heard: list[activations.Activations] = []
        if examples and any(name not in records for name in source.weights):
            for index, (subject, own) in enumerate(zip(subjects, examples, strict=True)):
                file = Path(scratch) / f"{index}.safetensors"
                step = f"running {subject.name}"
                heard.append(activations.collect(subject, own, file, partial(tell, step)))
        todo = [name for name in source.weights if name not in records]
        held = len(named) + sum(other is not None for other in (source.start, merged))
        for found in _measured(source, todo, shares, heard, held):
            if journal is None:
                records[found["tensor"]] = found
            else:
                journal.add(found)
            tell("measuring", len(records), len(source.weights))
        _check_moved(source, records)
        report = Report(
            models=dict(zip(source.models, source.paths, strict=True)),
            base=source.start,
            merged=None if merged is None else str(merged),
            key=key,
            of_adapters=source.of_adapters,
            records=[records[name] for name in source.weights],
            notes=[*source.notes, *unmeasured(records.values())],
            weighting=weighting,
            seconds=time.perf_counter() - started,
        )
        if journal is not None:
            report.write(Path(str(out)))
            journal.finish()
    return report


def _examples(inputs: Sequence[str | Path], count: int) -> list[activations.Examples]:
    """One a model, or none.

    Raises:
        CartError: of another number, or they cannot be read.
    """
    if not inputs:
        return []
    if len(inputs) not in (1, count):
        raise CartError(
            f"{count} models but {len(inputs)} inputs; give one for all, or one a model in order"
        )
    found = [activations.Examples.read(Path(path)) for path in inputs]
    return found * count if len(found) == 1 else found


def _measured(
    source: Source,
    names: Sequence[str],
    shares: Mapping[str, Sequence[float]] | None,
    heard: Sequence[activations.Activations],
    held: int,
) -> Iterator[Record]:
    """Records of weights in their order; small ones are measured side by side.

    Args:
        source: of the models.
        names: of the weights.
        shares: how much each model counts, by weight; None for alike.
        heard: what the models multiply them by.
        held: the number of models, the base and a merged one among them, whose weights are read.
    """
    where = places(source.weights)

    def one(name: str) -> Record:
        weight = source.read(name, None if shares is None else shares[name])
        return record(weight, source.models, _inputs(weight, heard), where[name])

    def at_once(name: str) -> int:
        return _AT_ONCE // (held * max(1, source.size(name)))

    for is_small, group in itertools.groupby(names, key=lambda name: at_once(name) > 1):
        own = list(group)
        most, threads = (min(map(at_once, own)), 1) if is_small else (1, torch.get_num_threads())
        yield from side_by_side(one, own, most, threads)


def _inputs(
    weight: Weight | Plain, heard: Sequence[activations.Activations]
) -> dict[int, Inputs] | None:
    """What each model multiplies a weight by; None where nothing is measured."""
    if not heard or isinstance(weight, Plain):
        return None
    found = {index: one.of(weight.name, weight.shape) for index, one in enumerate(heard)}
    return {index: one for index, one in found.items() if one is not None}


def _key(
    source: Source,
    subjects: Sequence[activations.Subject],
    examples: Sequence[activations.Examples],
    shares: Mapping[str, Sequence[float]] | None,
) -> str:
    """Of all that decides the records."""
    parts: list[object] = [REVISION, linalg.REVISION, merging.REVISION]
    parts += [source.models, source.identity(), [own.digest() for own in examples]]
    parts.append(shares)
    if subjects:  # what they make of the examples is transformers' doing, too
        parts += [version("transformers"), [subject.digest() for subject in subjects]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _check_moved(source: Source, records: Mapping[str, Record]) -> None:
    """Refuse models that are all the same, of which there is nothing to say.

    Raises:
        CartError: they are.
    """
    if not any(any(found["moved"]) for found in records.values()):
        where = "from their base" if source.has_base else "from each other"
        raise CartError(
            f"{', '.join(source.models)} do not differ {where} in any weight: nothing to merge"
        )
