"""CART as methods of FusionBench: ``method=cart``, ``cart/uncentered``, ``cart/indexing``, ...

Hydra finds the configs through `hydra_plugins/cart_plugin_search_path.py`; they name the classes
here. FusionBench is imported by the modules that need it, not by this one.
"""
