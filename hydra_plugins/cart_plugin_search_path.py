"""How Hydra finds the configs of FusionBench's CART methods: ``fusion_bench method=cart``.

Hydra 1.3 looks for plugins in this namespace package (no ``__init__.py`` here), Hydra 1.4 in the
entry-point group ``hydra.plugins``. Every Hydra program imports this module: it must stay light.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class CartSearchPath(SearchPathPlugin):
    """Adds our configs behind those of FusionBench, to FusionBench's programs only."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when it composes."""
        if "fusion_bench" not in sys.modules:
            return
        from cart_plugin.fusion_bench.compat import prepare
        from cart_plugin.fusion_bench.experiments import checkout_folder

        prepare()
        search_path.append("cart-plugin", "pkg://cart_plugin.fusion_bench.conf")
        if (folder := checkout_folder()) is not None:
            search_path.append("cart-plugin", f"file://{folder}")
