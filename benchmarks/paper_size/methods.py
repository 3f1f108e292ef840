"""The methods that are measured, as FusionBench's commands call them.

Settings are the configs' own, but for CART's ranks and scales, which are those of the paper for
that number of tasks: a higher rank takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the authors' repository, by number of tasks: for the CLIP models, and as they start AdaRank.
_PAPER = {
    "b32": {8: (0.12, 2.0), 14: (0.16, 1.5), 20: (0.32, 1.9)},
    "l14": {8: (0.16, 3.0), 14: (0.16, 1.25), 20: (0.16, 1.0)},
    "roberta": {8: (0.04, 1.6), 14: (0.04, 1.6), 20: (0.04, 1.6)},
}
_DEFAULT = (0.08, 1.0)


@dataclass(frozen=True)
class Method:
    """A method of the table.

    Attributes:
        title: its name there.
        choice: `method=<choice>`.
        options: further overrides.
        holds_all: keeps all models, or all differences, in memory.
        ours: of the plugin.
    """

    title: str
    choice: str
    options: tuple[str, ...] = ()
    holds_all: bool = True
    ours: bool = False


METHODS = {
    "start": Method("start-up and the base alone", "dummy", holds_all=False),
    "average": Method("simple average", "simple_average", holds_all=False),
    "task_arithmetic": Method("task arithmetic", "task_arithmetic", holds_all=False),
    "cart": Method("CART", "cart", ours=True),
    "cart_auto": Method("CART, no hyperparameters", "cart/auto", ours=True),
    "cart_indexing": Method("CART-Indexing", "cart/indexing", ours=True),
    "iso_c": Method("Iso-C", "isotropic_merging/iso_c"),
    "ties": Method("TIES", "ties_merging"),
    "tsvm": Method("TSV-M", "task_singular_vector/TaskSingularVectorMerging"),
    "iso_cts": Method("Iso-CTS", "isotropic_merging/iso_cts"),
    "wudi_2": Method("WUDI, 2 of its 400 steps", "wudi/wudi", ("method.iter_num=2",)),
    "wudi": Method("WUDI", "wudi/wudi"),
}
BAR = ("cart", "cart_auto")
PEERS = ("tsvm", "iso_cts")


def settings(method: str, kind: str, count: int) -> list[str]:
    """The overrides that name a method and set it."""
    one = METHODS[method]
    overrides = [f"method={one.choice}", *one.options]
    if method == "cart":
        ratio, scale = _PAPER.get(kind, {}).get(count, _DEFAULT)
        overrides += [f"method.rank_ratio={ratio}", f"method.scaling_factor={scale}"]
    return overrides
