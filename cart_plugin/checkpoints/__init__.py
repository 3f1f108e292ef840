"""Model folders, weight files and side files on disk: the one reader and the one writer.

Modules, from the bottom: `dtypes`, `headers` (what a weight file holds), `files` (whole or not at
all; JSON), `reading` (folders, shards, adapters; a tensor at a time), `adapters` (what their
tensors are), `writing` (safetensors), `side_files` (tokenizers and the like), `names` (the
checkpoint's and the model's), `orientation` (which side of a weight the inputs are on), `stored`
(what of that a merge has to know), `hub` (names there), `recipes` (YAML that people write).
"""

REVISION = 1
"""Raised when what is read or written changes, as `cart_plugin.linalg.REVISION` is."""
