"""The dtypes of weight files: safetensors' names and torch's."""

from __future__ import annotations

import torch

# Packed types (4 and 6 bits, bare scales, wide unsigned integers) are missing: torch has no name or
# no use for them. The 8-bit floats are there to be named, though they cannot be averaged either.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's dtypes by safetensors' names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' names by torch's dtypes."""

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a user may ask for, by the names that config.json and mergekit use."""
