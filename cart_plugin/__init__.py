"""CART, low-rank merging around the average of fine-tuned models, for the tools people already use.

The public names are loaded on first use, so that importing the package (which every Python start
does through the autoload hook) costs nothing: no torch, no mergekit.

Source: "Revisiting Weight Averaging for Model Merging", arXiv 2412.12153.
"""

TYPE_CHECKING = False  # type checkers know the name; typing would take 10 ms of every start

__version__ = "0.1.0"

_HOME_OF = {
    "CartError": "errors",
    "CartWarning": "errors",
    "LowRank": "lowrank",
    "RankRule": "lowrank",
    "truncated_svd": "lowrank",
    "CartSettings": "merging",
    "is_decomposed": "merging",
    "merge_state_dicts": "merging",
    "merge_tensors": "merging",
}

__all__ = [
    "CartError",
    "CartSettings",
    "CartWarning",
    "LowRank",
    "RankRule",
    "is_decomposed",
    "merge_state_dicts",
    "merge_tensors",
    "truncated_svd",
]

if TYPE_CHECKING:
    from cart_plugin.errors import CartError, CartWarning
    from cart_plugin.lowrank import LowRank, RankRule, truncated_svd
    from cart_plugin.merging import CartSettings, is_decomposed, merge_state_dicts, merge_tensors


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
