"""Tiny stand-ins for what the vision suite downloads: a font, a task, an encoder."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.common.tasks import Task
from benchmarks.vision.splits import Split

LETTERS = "abcdef"


def write_font(path: Path, family: str, design: int, weight: int = 60) -> None:
    """Write a TrueType font whose letters are a few bars, placed at random by `design`."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    rng = np.random.default_rng(design)
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for letter in LETTERS:
        pen = TTGlyphPen(None)
        for _ in range(5):
            left, low = (int(value) for value in rng.integers(0, 700, 2))
            wide, high = (weight, 400) if rng.random() < 0.5 else (400, weight)
            corners = [(left, low), (left, low + high), (left + wide, low + high)]
            pen.moveTo(corners[0])
            for corner in [*corners[1:], (left + wide, low)]:
                pen.lineTo(corner)
            pen.closePath()
        glyphs[letter] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): letter for letter in LETTERS})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def blocks(count: int, rng: np.random.Generator, first_group: int) -> Split:
    """Images of two classes: noise of any tint, a little more red or a little more blue."""
    images = rng.integers(0, 60, (count, 56, 56, 3), dtype=np.uint8)
    labels = np.arange(count) % 2
    images += rng.integers(0, 40, (count, 1, 1, 3), dtype=np.uint8)  # a tint of its own
    images[labels == 0, ..., 0] += 30
    images[labels == 1, ..., 2] += 30
    return Split(images, labels.astype(np.int64), np.arange(first_group, first_group + count))


def build_blocks(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The builder of a two-class task that needs no download."""
    return {
        "train": blocks(24, rng, 0),
        "validation": blocks(12, rng, 100),
        "test": blocks(20, rng, 200),
    }


BLOCKS = Task("Blocks", 2, (), build_blocks, "image")


def tiny_encoder(seed: int = 0):
    """A Dinov2Model of width 16 with two blocks."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():  # untrained, it would hardly look at the image
        model.embeddings.patch_embeddings.projection.weight.mul_(20)
    return model
