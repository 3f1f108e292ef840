"""Where FusionBench 0.2.33 does not import beside current releases of what it uses.

Each function names the fault; it changes nothing where there is none. `prepare` does what has to
happen before FusionBench's own modules are imported; the search path plugin calls it when a
FusionBench program composes its config, and the modules of this package before they import theirs.
"""

from __future__ import annotations

import typing


def prepare() -> None:
    """Make FusionBench's model and task pools importable."""
    _typing_override()


def _typing_override() -> None:
    # FusionBench 0.2.33 imports `override` from `typing` for its DINOv2, ConvNeXt and ResNet
    # pools and for ResNet's AdaMerging; `typing` has it from Python 3.12 on.
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]


def clip_vision_transformer() -> None:
    """Let FusionBench's CLIP task pool import.

    Its 0.2.33 imports `CLIPVisionTransformer`, which transformers 5 has merged into
    `CLIPVisionModel`. Called by our CLIP task pool only: it imports transformers.
    """
    from transformers.models.clip import modeling_clip

    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = modeling_clip.CLIPVisionModel
