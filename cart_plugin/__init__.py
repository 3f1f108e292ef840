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
    "LowRank": "linalg.factors",
    "RankRule": "linalg.rules",
    "truncated_svd": "linalg.svd",
    "CartSettings": "merging.settings",
    "is_decomposed": "merging.tensors",
    "merge_state_dicts": "merging.state_dicts",
    "merge_tensors": "merging.cart",
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
    from cart_plugin.linalg.factors import LowRank
    from cart_plugin.linalg.rules import RankRule
    from cart_plugin.linalg.svd import truncated_svd
    from cart_plugin.merging.cart import merge_tensors
    from cart_plugin.merging.settings import CartSettings
    from cart_plugin.merging.state_dicts import merge_state_dicts
    from cart_plugin.merging.tensors import is_decomposed


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
