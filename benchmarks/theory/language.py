"""The language models of `benchmarks.llm`: their weights, and what merges add to the base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.common.beside import slug
from benchmarks.common.record import Record
from benchmarks.llm.backbone import prepare_backbone
from benchmarks.llm.finetune import FineTuning, Tuned, finetune_all
from benchmarks.llm.suite import BESIDE, merged_beside, work_folder
from benchmarks.theory.merges import measure
from cart_plugin.checkpoints.reading import Checkpoint, open_folder
from cart_plugin.inspect.fused import Fused
from cart_plugin.inspect.merges import AUTO_WITH_BASE, AVERAGE
from cart_plugin.inspect.weights import Weight, of_tensors
from cart_plugin.merging.tensors import is_decomposed


def method_of(row: Mapping[str, Any]) -> str:
    """The method of a row of the results: `also-tsv-m-2ad2` is called tsv-m."""
    if row["kind"] == "other":
        name: str = row["name"]
        return name.removeprefix("also-").rpartition("-")[0]
    method: str = row["method"]
    return method


def merged_by(
    method: str, settings: Mapping[str, Any], weight: Weight, tuned: Sequence[Tensor], base: Tensor
) -> Tensor:
    """What a method of mergekit adds to the base, ``(stack, m, n)``, at settings of a recipe.

    Those of this project are taken from what is known of the weight already where they are at
    their defaults.
    """
    from mergekit.merge_methods import merge_tensors

    if method == "cart_auto":
        found = dict(weight.merges())
        return found.get(AUTO_WITH_BASE, found.get("cart_auto", found[AVERAGE]))
    if method == "linear":
        return next(weight.merges())[1]
    with_base = method != "cart"
    merged = merge_tensors(
        [*tuned, base] if with_base else tuned,
        method,
        parameters=settings,
        base_index=len(tuned) if with_base else None,
        name=weight.name,
    )
    return (merged - base).reshape(weight.shape)


class Models:
    """Language models of one base: it and LoRA adapters.

    Attributes:
        base: the base's weights.
        tuned: the models'.
    """

    def __init__(self, base: Path, tuned: Mapping[str, Tuned]) -> None:
        """Open them."""
        self.base = open_folder(base, "the base")
        self.tuned = [Fused(self.base, str(one.adapter), name) for name, one in tuned.items()]

    def weights(self) -> Iterator[Weight]:
        """Those that methods decompose, one at a time."""
        for name, info in self.base.tensors.items():
            if not is_decomposed(name, info.shape):
                continue
            tensors = [one.read(name) for one in self.tuned]
            known = {index: one.difference(name) for index, one in enumerate(self.tuned)}
            exact = {index: one for index, one in known.items() if one is not None}
            names = [one.name for one in self.tuned]
            weight = of_tensors(name, tensors, names, self.base.read(name), exact=exact)
            if isinstance(weight, Weight):
                yield weight

    def merges(
        self,
        weight: Weight,
        rows: Sequence[Mapping[str, Any]],
        beside: Mapping[str, Checkpoint],
    ) -> Iterator[tuple[str, Tensor]]:
        """What each row's method adds to the base."""
        start = self.base.read(weight.name)
        tuned = [one.read(weight.name) for one in self.tuned]
        for row in rows:
            method = method_of(row)
            if method in beside:
                merged = beside[method].read(weight.name)
                yield method, (merged - start).reshape(weight.shape)
            else:
                yield method, merged_by(method, row["settings"], weight, tuned, start)


def measured_models(told: Path, record: Record) -> None:
    """Measure the merges of all fine-tuning seeds; what is known is not done again.

    Without data alone: to run the models on inputs would take longer than all else.

    Args:
        told: the suite's results.
        record: of the measures: a case a seed.
    """
    results = json.loads(told.read_text())
    tasks = list(results["tasks"])
    settings = FineTuning(**results["fine_tuning"])
    base = prepare_backbone()
    for seed, rows in results["test"].items():
        if seed in record.cases:
            continue
        tuned = finetune_all(tasks, int(seed), settings)
        models = Models(base, tuned)
        work = work_folder(tasks, settings, results["examples"])
        merged = [row for row in rows if row["kind"] in ("merged", "other")]
        methods = [BESIDE[name] for name in map(method_of, merged) if name in BESIDE]
        beside = {
            slug(method): open_folder(folder, method)
            for method, folder in merged_beside(tuned, base, work, methods).items()
        }
        torch.manual_seed(0)  # for the masks of DARE
        merges = partial(models.merges, rows=merged, beside=beside)
        record.put(seed, measure(models.weights(), merges))
        click.echo(f"{told.parent.name} {seed}")
