"""The CUDA GPU that is at hand, and where its figures go."""

from __future__ import annotations

import re
from pathlib import Path

import click
import torch

from benchmarks.common.measure import RESULTS


def card() -> str:
    """The name of the first GPU.

    Raises:
        ClickException: torch finds none.
    """
    if not torch.cuda.is_available():
        built = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}"
        raise click.ClickException(
            f"no CUDA GPU here: torch {torch.__version__}, which {built}, finds none"
        )
    return torch.cuda.get_device_name(0)


def gpu_results() -> Path:
    """The folder of this GPU's results."""
    name = re.sub(r"[^a-z0-9]+", "-", card().lower()).strip("-")
    return RESULTS / "gpu" / name
