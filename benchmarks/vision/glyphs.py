"""Letters of one script, rendered from Debian's fonts; whole font families are held out.

Two families may be one design under two names (a derived font, a monospaced twin). Those are found
by their pictures and kept in one group, so that no near-copy of a training face is in validation or
test.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common.splits import SPLITS, assign_groups, merge_groups
from benchmarks.vision.splits import Split

SIZE = 56
TARGETS = {"train": 3000, "validation": 500, "test": 1000}  # images to render, roughly
MOST_FACES = 6  # of one family

# Mean correlation of two faces' letters above which they count as one design. Unrelated faces of
# one script reach 0.85 at most; a typeface and its derived, rounded or monospaced twin 0.88 and
# more (seen on the fonts used here).
SAME_DESIGN = 0.87

_STYLE_WORDS = re.compile(
    r"\b(gpl|gnu|regular|(semi|extra|ultra)?(bold|light)|medium|thin|black|heavy|italic|oblique|"
    r"condensed|condenced|condencerd|cond|caps|mono|sans|serif|modern|block|ui|looped|nerd|eco|"
    r"ligature|p|s|\d+)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Face:
    """One font face that has every letter of the script."""

    path: Path
    index: int  # within a collection file
    family: str
    style: str


def find_faces(folders: list[Path], letters: str) -> list[Face]:
    """All faces under the folders whose character map has every letter, in a stable order."""
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # old fonts have harmless table errors
    faces = []
    paths = [
        path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES
    ]
    for path in sorted(paths, key=lambda path: (path.name, str(path))):
        if path.is_symlink():
            continue
        try:
            fonts = (
                TTCollection(path, lazy=True).fonts
                if path.suffix == ".ttc"
                else [TTFont(path, lazy=True)]
            )
            for index, font in enumerate(fonts):
                cmap = font.getBestCmap() or {}
                if all(ord(letter) in cmap for letter in letters):
                    names = font["name"]
                    family, style = (
                        names.getBestFamilyName() or path.stem,
                        names.getBestSubFamilyName() or "",
                    )
                    faces.append(Face(path, index, family, style))
        except (TTLibError, OSError, KeyError, AssertionError):
            continue  # not a font that we can read; the others carry the task
    return faces


_SUFFIXES = {".ttf", ".otf", ".ttc", ".woff"}


def family_stem(family: str) -> str:
    """The family's name without style words: `BPG Nateli Caps GPL&GNU` gives `bpg nateli`."""
    name = re.sub(r"[^\w ]", " ", family)
    return " ".join(_STYLE_WORDS.sub(" ", name).lower().split()) or family.lower()


def limit_faces(faces: list[Face], rng: np.random.Generator, most: int = MOST_FACES) -> list[Face]:
    """A random choice of `most` faces a family: one with 18 weights must not outweigh the rest."""
    chosen: dict[str, int] = {}
    kept = []
    for position in rng.permutation(len(faces)):
        stem = family_stem(faces[position].family)
        chosen[stem] = chosen.get(stem, 0) + 1
        if chosen[stem] <= most:
            kept.append(position)
    return [faces[position] for position in sorted(kept)]


def letter_masks(face: Face, letters: str) -> list[Image.Image] | None:
    """Each letter as a grey mask, white on black, cropped to its ink; None if the face cannot."""
    masks = []
    try:
        font = ImageFont.truetype(
            str(face.path), 96, face.index, layout_engine=ImageFont.Layout.BASIC
        )
    except OSError:
        return None
    for letter in letters:
        canvas = Image.new("L", (288, 288))
        try:
            ImageDraw.Draw(canvas).text((96, 72), letter, fill=255, font=font)
        except OSError:  # FreeType cannot render this face
            return None
        box = canvas.getbbox()
        if box is None or min(box[2] - box[0], box[3] - box[1]) < 4:
            return None
        masks.append(canvas.crop(box))
    if len({mask.tobytes() for mask in masks}) < 0.9 * len(masks):  # "missing glyph" boxes
        return None
    return masks


def signature(masks: list[Image.Image]) -> np.ndarray:
    """A face as a unit vector (letters * 400,): its letters at 20 x 20, each centred, scaled."""
    rows = []
    for mask in masks:
        fitted = _fit(mask, 18)
        canvas = Image.new("L", (20, 20))
        canvas.paste(fitted, ((20 - fitted.width) // 2, (20 - fitted.height) // 2))
        row = np.asarray(canvas, dtype=np.float64).ravel()
        row -= row.mean()
        rows.append(row / max(float(np.linalg.norm(row)), 1e-9))
    return np.concatenate(rows) / np.sqrt(len(rows))


def group_faces(
    faces: list[Face], signatures: np.ndarray, threshold: float = SAME_DESIGN
) -> np.ndarray:
    """Number the groups of faces: same family name (less style words), or nearly the same pictures.

    Args:
        faces: F faces.
        signatures: (F, d), rows of unit length.
        threshold: correlation above which two faces are one design.

    Returns:
        int64, (F,).
    """
    stems = [family_stem(face.family) for face in faces]
    alike = signatures @ signatures.T > threshold
    pairs = [
        (first, second)
        for first in range(len(faces))
        for second in range(first)
        if alike[first, second] or stems[first] == stems[second]
    ]
    return merge_groups(len(faces), pairs)


def _fit(mask: Image.Image, side: int) -> Image.Image:
    """Scale to `side` pixels on the longer side, keeping the shape."""
    scale = side / max(mask.size)
    size = (max(1, round(mask.width * scale)), max(1, round(mask.height * scale)))
    return mask.resize(size, Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.BOX)


def render(mask: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A letter, dark on light, of random size, tilt, place and contrast: uint8 (56, 56, 3)."""
    letter = _fit(mask, int(rng.integers(34, 47)))
    canvas = Image.new("L", (SIZE, SIZE))
    free = SIZE - letter.width, SIZE - letter.height
    place = [int(np.clip(side / 2 + rng.normal(0, 2), 0, side)) for side in free]
    canvas.paste(letter, (place[0], place[1]))
    canvas = canvas.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    ink, paper = rng.uniform(0, 90), rng.uniform(190, 255)
    grey = paper + (ink - paper) * np.asarray(canvas, dtype=np.float64) / 255
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)


def build(letters: str, folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """Render a script's task: a class a letter, 20 % of the faces for test, 15 % for validation."""
    usable, masks, signatures = [], [], []
    for face in limit_faces(find_faces([folders[name] for name in sorted(folders)], letters), rng):
        letter_images = letter_masks(face, letters)
        if letter_images is not None:
            usable.append(face)
            masks.append(letter_images)
            signatures.append(signature(letter_images))
    groups = group_faces(usable, np.stack(signatures))
    split_of = assign_groups(np.bincount(groups), test=0.2, validation=0.15, rng=rng, least=3)
    result = {}
    for number, name in enumerate(SPLITS):
        chosen = [
            position for position in range(len(usable)) if split_of[groups[position]] == number
        ]
        repeats = -(-TARGETS[name] // (len(chosen) * len(letters)))
        images, labels, owners = [], [], []
        for position in chosen:
            for label, mask in enumerate(masks[position]):
                for _ in range(repeats):
                    images.append(render(mask, rng))
                    labels.append(label)
                    owners.append(groups[position])
        result[name] = Split(
            np.stack(images), np.array(labels, dtype=np.int64), np.array(owners, dtype=np.int64)
        )
    return result
