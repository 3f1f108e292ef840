"""Tasks of drawings: from which theme or set is an icon, and to which group belongs an emoji.

An icon's name is what is held out: `document-open` of all themes is in one split. So is an emoji
with its variants (skin tone, woman, man), in all drawing styles. Drawings that look the same are
one group, too; the same drawing under two labels is dropped.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common.splits import SPLITS, assign_groups, merge_groups
from benchmarks.vision.splits import Split

SIZE = 56
MOST_ICONS = 1000  # of one theme
MOST_OF_A_SET = 500

# Theme -> its package and where its icons of about 48 pixels are.
THEMES = {
    "breeze": ("breeze-icon-theme", "usr/share/icons/breeze/*/48/*.svg"),
    "elementary": ("elementary-xfce-icon-theme", "usr/share/icons/elementary-xfce/*/48/*.png"),
    "faenza": ("faenza-icon-theme", "usr/share/icons/Faenza/*/48/*.png"),
    "numix": ("numix-icon-theme", "usr/share/icons/Numix/48/*/*.svg"),
    "suru": ("suru-icon-theme", "usr/share/icons/suru/*/scalable/*.svg"),
}
# Sets that are told apart by their style; bi, ion, mdi, ph and ri look too much like these.
ICON_SETS = (
    *("arcticons", "carbon", "devicon", "flat-color-icons", "game-icons", "icon-park"),
    *("pixelarticons", "tabler", "vaadin", "vscode-icons"),
)
EMOJI_SETS = (  # the first says which emoji are in which group
    "@iconify-json/noto",
    "@iconify-json/fluent-emoji-flat",
    "@iconify-json/noto-v1",
    "@iconify-json/twemoji",
)
# Without activities and objects: what of a new emoji makes it one of them is not to be seen.
EMOJI_GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)

_STYLE = re.compile(
    r"^(file|folder)-type-(light-)?|"
    r"(-(bold|filled|fill|light|line|o|opened|outline|sharp|solid|thin|wordmark|\d+))+$"
)
_SKIN_TONE = re.compile(r"-((medium-)?(light|dark)|medium)(-skin-tone)?(?=-|$)")
_PERSON = re.compile(r"\b(wo)?(man|men)\b|\b(person|people|boy|girl|male|female)\b")


def themes(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The theme of an icon; names are held out."""
    items = []
    for label, (package, pattern) in enumerate(THEMES.values()):
        paths = sorted(path for path in folders[package].glob(pattern) if not path.is_symlink())
        for position in rng.permutation(len(paths))[:MOST_ICONS]:
            path = paths[position]
            items.append((path.stem.removesuffix("-symbolic"), label, draw(path.read_bytes())))
    return _split(items, rng)


def icon_sets(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The set of an icon; names are held out, with all variants of a drawing."""
    items = []
    for label, name in enumerate(ICON_SETS):
        package = folders[f"@iconify-json/{name}"] / "package"
        drawings = json.loads((package / "icons.json").read_text())
        shown = sorted(  # hidden are those that the set has withdrawn
            key for key, icon in drawings["icons"].items() if not icon.get("hidden")
        )
        for position in rng.permutation(len(shown))[:MOST_OF_A_SET]:
            key = shown[position]
            image = draw(svg_of(drawings["icons"][key], drawings))
            items.append((icon_stem(key), label, image))
    return _split(items, rng)


def icon_stem(name: str) -> str:
    """An icon's name without style and frame: `home-2-outline` gives `home`."""
    return _STYLE.sub("", name)


def emoji_groups(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """The Unicode group of an emoji; emoji are held out with all their variants."""
    first = folders[EMOJI_SETS[0]] / "package"
    categories = json.loads((first / "metadata.json").read_text())["categories"]
    items = []
    for package in EMOJI_SETS:
        drawings = json.loads((folders[package] / "package" / "icons.json").read_text())
        for label, group in enumerate(EMOJI_GROUPS):
            for name in sorted(categories[group]):
                icon = drawings["icons"].get(name)
                if icon is None or _SKIN_TONE.search(name):
                    continue
                items.append((emoji_stem(name), label, draw(svg_of(icon, drawings))))
    return _split(items, rng)


def emoji_stem(name: str) -> str:
    """An emoji's name without skin tone and gender: `woman-artist` gives `artist`."""
    return re.sub(r"-+", "-", _PERSON.sub("", _SKIN_TONE.sub("", name))).strip("-") or "person"


def svg_of(icon: dict[str, object], drawings: dict[str, object]) -> bytes:
    """An Iconify entry as an SVG file."""
    width = icon.get("width", drawings.get("width", 16))
    height = icon.get("height", drawings.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    ).encode()


def draw(content: bytes) -> np.ndarray | None:
    """A PNG or SVG file, 48 pixels wide on white: uint8 (56, 56, 3); None if nothing is to see."""
    try:
        if not content.startswith(b"\x89PNG"):
            import cairosvg

            content = cairosvg.svg2png(bytestring=content, output_width=48, output_height=48)
        icon = Image.open(io.BytesIO(content)).convert("RGBA")
    except Exception:  # cairosvg raises whatever a damaged drawing makes it trip over
        return None
    icon.thumbnail((48, 48))
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(icon, ((SIZE - icon.width) // 2, (SIZE - icon.height) // 2))
    pixels = np.asarray(canvas.convert("RGB"))
    return pixels if pixels.std() > 4 else None  # nothing to see, or white on white


def look(image: np.ndarray) -> bytes:
    """A key that two drawings share if they look the same at 8 x 8 pixels and 8 shades."""
    small = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX))
    return (small // 32).tobytes()


def _split(
    items: Iterable[tuple[str, int, np.ndarray | None]], rng: np.random.Generator
) -> dict[str, Split]:
    """Group (name, label, image) by name and look; drop looks with two labels; 25 % test."""
    drawn = [(name, label, image) for name, label, image in items if image is not None]
    labels_of = defaultdict(set)
    for _, label, image in drawn:
        labels_of[look(image)].add(label)
    drawn = [item for item in drawn if len(labels_of[look(item[2])]) == 1]
    seen: dict[object, int] = {}
    pairs = []
    for position, (name, _, image) in enumerate(drawn):
        keys = (name, look(image))
        pairs += [(position, seen.setdefault(key, position)) for key in keys]
    groups = merge_groups(len(drawn), pairs)
    split_of = assign_groups(np.bincount(groups), test=0.25, validation=0.15, rng=rng)
    images = np.stack([image for _, _, image in drawn])
    labels = np.array([label for _, label, _ in drawn], dtype=np.int64)
    everything = Split(images, labels, groups)
    return {
        name: everything.take(np.flatnonzero(split_of[groups] == number))
        for number, name in enumerate(SPLITS)
    }
