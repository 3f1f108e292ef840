"""Adapters in, one adapter out: from folders to a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cart_plugin.adapters import inputs, peft_files, settings
from cart_plugin.adapters.agreement import agree
from cart_plugin.adapters.report import Report, Sums
from cart_plugin.adapters.work import Done, Merge
from cart_plugin.checkpoints import writing
from cart_plugin.checkpoints.files import check_space, unfinished, write_text
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cart_plugin.errors import CartError

Progress = Callable[[str, int, int], None]
"""Is told a step, how many of its weights are done, and their number."""


def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: Literal["auto", "cart", "linear"] = "auto",
    rank: int | Literal["full"] | None = None,
    weights: Sequence[float] | None = None,
    lambda_: float | None = None,
    rank_ratio: float | None = None,
    keep: int | None = None,
    names: Sequence[str | None] | None = None,
    dtype: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Merge LoRA adapters of one base into one, from their factors alone.

    The base's weights are not read, and no matrix of a weight's size is formed
    (`cart_plugin.merging.spans`). Writes ``out``, which PEFT and multi-LoRA servers load: A and B
    of one rank for all modules, a scale of 1, and a report.json. It appears when all is done.

    Args:
        adapters: folders that PEFT's save_pretrained wrote, or names on the hub of adapters that
            are in its local cache.
        out: the folder to write; must not exist, or be empty and not the current one.
        method: ``auto`` disturbs the adapters least on their own inputs, as the merge method
            ``cart_auto`` does with whole models and their base; ``cart`` adds the leading
            directions of their differences from the average to it; ``linear`` is the average.
        rank: of the merged adapter; the largest of the adapters' ranks if None. What is left out
            is chosen by the method's objective. ``"full"`` leaves nothing out: the sum of the
            adapters' ranks.
        weights: one an adapter; None means equal.
        lambda_: of ``cart``: scale of what is added to the average; 1 if None.
        rank_ratio: of ``cart`` and ``auto``: share of the full rank of a weight that is kept of
            each difference; as for whole models if neither it nor `keep` is given, which is a part
            of the adapters' rank for ``cart``, and all but always all of it for ``auto``.
        keep: that number of directions instead.
        names: what to call the adapters, each by its folder where None.
        dtype: of the result, one of `checkpoints.dtypes.STORED`; the adapters' own if None.
        base: the base model's name to write; the adapters' own if None, which must then agree.
        progress: is told how far the work is.

    Returns:
        What is kept of each adapter, and what they have in common.

    Raises:
        CartError: adapters that cannot be merged; the message says what to do.
    """
    started = time.perf_counter()
    adapters = settings.listed(adapters)
    request = settings.request(
        method=method, rank=rank, lambda_=lambda_, rank_ratio=rank_ratio, keep=keep, dtype=dtype
    )
    shares = settings.shares_of(weights, len(adapters)) if adapters else []
    if base is not None and (not isinstance(base, str) or not base.strip()):
        raise CartError(f"base must be the name or folder of a model, got {base!r}")
    folders = inputs.find(adapters)
    chosen = settings.names_of(adapters, names)
    by_name = dict(zip(chosen, shares, strict=True))
    plan = agree(inputs.open_adapters(folders, chosen), base)
    merge = Merge(plan, request, [by_name[adapter.name] for adapter in plan.adapters])
    paths = {name: str(path) for name, path in zip(chosen, adapters, strict=True)}
    report, sums = Report(merge, paths), Sums(merge)
    layout, config = merge.layout, peft_files.config_text(merge)
    tell = progress or (lambda *_: None)
    with unfinished(Path(out)) as folder:
        check_space(folder, writing.file_bytes(layout))
        with writing.TensorFile(folder / ADAPTER_WEIGHTS, layout) as file:

            def take(done: Done) -> None:
                for name, tensor in done.tensors.items():
                    file.write(name, tensor)
                sums.add(done)
                tell("merging", len(sums.modules), len(plan.shapes))

            merge.weights(take)
            for name, tensor in merge.whole():
                file.write(name, tensor)
        sums.fill(report)
        report.bytes = (folder / ADAPTER_WEIGHTS).stat().st_size
        if note := peft_files.copy_side_files(folders, folder):
            report.notes.append(note)
        write_text(folder / ADAPTER_CONFIG, config)
        report.seconds = time.perf_counter() - started
        report.write(folder)
    return report
