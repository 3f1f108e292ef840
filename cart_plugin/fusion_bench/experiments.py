"""Where the ready experiments lie: ``fusion_bench +experiment=cart/clip-vit-b32_8-tasks``."""

from __future__ import annotations

from pathlib import Path


def checkout_folder() -> Path | None:
    """The folder ``configs/fusion_bench`` of a checkout; None where the package is installed.

    An installed package carries its ``experiment`` folder among its other Hydra configs.
    """
    package = Path(__file__).parent
    if (package / "conf" / "experiment").is_dir():
        return None
    folder = package.parents[1] / "configs" / "fusion_bench"
    return folder if folder.is_dir() else None
