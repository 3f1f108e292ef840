"""Whether a rank rule keeps adapters whole: their differences from the average then sum to zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cart_plugin.doctor import adapters
from cart_plugin.doctor.findings import Finding, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.doctor.merges import Merge
from cart_plugin.linalg.rules import NEARLY_ALL
from cart_plugin.mergekit import settings_of
from cart_plugin.merging.tensors import matrix_shape
from cart_plugin.wording import some


def check_rules(merges: Sequence[Merge], config: Recipe) -> Iterator[Finding]:
    """Report rank rules that keep all of `model+adapter` inputs in most of what these change."""
    ranks: dict[str, Mapping[str, int]] = {}
    bases: dict[str, str] = {}
    for label, model in references(config).items():
        if model.lora is not None:
            ranks[label] = adapters.ranks(Path(model.lora.path))
            bases[label] = str(model.model)
    changed, whole, seen, rules = 0, 0, set[int](), dict[str, None]()
    for merge in merges:
        labels = merge.counting
        if not merge.is_decomposed or len({bases.get(label, label) for label in labels}) != 1:
            continue  # models of several bases differ by more than adapters
        found = [_rank(ranks.get(label, {}), merge.planned.sources[label]) for label in labels]
        # Two models are averaged at any rank, which has its own warning.
        if len(found) < 3 or not any(found) or not _is_around_average(merge):
            continue
        changed += 1
        if merge.rank_rules and _keeps(merge, sum(found)):
            whole += 1
            seen.update(rank for rank in found if rank)
            rules.update((f"{name} {value:g}", None) for name, value in merge.rank_rules.items())
    if 2 * whole <= changed:
        return
    low, high = min(seen), max(seen)
    yield warning(
        f"{some(rules)} keeps adapters of rank {low if low == high else f'{low} to {high}'} whole "
        f"in {whole:,} of the {changed:,} decomposed tensors that they change: whole differences "
        "from the average sum to zero, and the result is the average",
        "delete the rank rule, so that a share of what there is is kept"
        + (f"; or set rank: {low // 2}, half of the adapters'" if low > 1 else "")
        + "; or set merge_method: cart_auto",
    )


def _rank(ranks: Mapping[str, int], names: Sequence[str]) -> int:
    """Of what an adapter adds to a tensor, by one of the names that this may have."""
    return next((ranks[name] for name in names if name in ranks), 0)


def _is_around_average(merge: Merge) -> bool:
    settings = settings_of(merge.planned.parameters)
    return settings.center != "base" and settings.lambda_ != "auto"


def _keeps(merge: Merge, rank: int) -> bool:
    """Whether the tensor's rule keeps differences of a rank."""
    _, m, n = matrix_shape(merge.planned.name, merge.shape)
    kept = merge.rule.fixed_rank(m, n)
    if kept is None:
        return (merge.rule.energy or 0) >= NEARLY_ALL
    return kept >= min(rank, m, n)
