"""T LoRA adapters into one, from their factors alone.

::

    from cart_plugin.adapters import merge_adapters, merge_loaded

    merge_adapters(["math", "code", "german"], "merged")        # folders in, a folder out
    merge_loaded(model, ["math", "code"], "both")               # of a loaded PeftModel

Modules, from the bottom: `kinds` (what an adapter's config says), `inputs` (one adapter),
`agreement` (all of them), `settings` (the options), `work` (the merge), `servers` (who loads it),
`report`, `peft_files` (how PEFT wants it), `run` and `loaded` (all of it), `recipes` (the options
from a file).
"""

from cart_plugin.adapters.loaded import merge_loaded
from cart_plugin.adapters.run import merge_adapters

REVISION = 2
"""Raised when merged adapters come to have other numbers (with those of `merging` left as they
are), so that measurements of one revision compare with each other only."""

__all__ = ["merge_adapters", "merge_loaded"]
