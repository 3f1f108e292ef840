"""Icon tasks: variants and copies stay together, ambiguous drawings are dropped."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.vision import icons
from benchmarks.vision.splits import check_no_leak


def drawing(seed):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((56, 56), Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("artist", "artist"),
        ("woman-artist-medium-dark-skin-tone", "artist"),
        ("astronaut-medium-light", "astronaut"),
        ("man-blonde-hair", "blonde-hair"),
        ("woman", "person"),
        ("light-bulb", "light-bulb"),
        ("manual-wheelchair", "manual-wheelchair"),
    ],
)
def test_variants_of_an_emoji_have_one_name(name, stem):
    assert icons.emoji_stem(name) == stem


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("home-2-outline", "home"),
        ("heart-filled", "heart"),
        ("folder-open-o", "folder-open"),
        ("line-chart", "line-chart"),
        ("thin", "thin"),
        ("docker-wordmark", "docker"),
        ("folder-type-light-docker-opened", "docker"),
    ],
)
def test_styles_of_an_icon_have_one_name(name, stem):
    assert icons.icon_stem(name) == stem


def test_an_icon_set_is_read_without_what_it_has_withdrawn(tmp_path):
    pytest.importorskip("cairosvg")
    folders = {}
    for label, name in enumerate(icons.ICON_SETS):
        drawings = {
            f"{name}{'abcdefgh'[size]}": {
                "body": f'<path d="M{label} 0h{size + 4}v{label + 5}h-{size + 4}z"/>',
                "hidden": size == 7,
            }
            for size in range(8)
        }
        folder = tmp_path / name / "package"
        folder.mkdir(parents=True)
        (folder / "icons.json").write_text(json.dumps({"icons": drawings}))
        folders[f"@iconify-json/{name}"] = tmp_path / name
    splits = icons.icon_sets(folders, np.random.default_rng(0))
    check_no_leak(splits)
    labels = np.concatenate([split.labels for split in splits.values()])
    assert set(labels) == set(range(len(icons.ICON_SETS)))
    assert np.bincount(labels).max() <= 7


def test_names_and_copies_are_not_torn_apart():
    items = [(f"icon{number}", number % 2, drawing(number)) for number in range(200)]
    items += [(f"icon{number}", 1 - number % 2, drawing(1000 + number)) for number in range(50)]
    items += [(f"copy{number}", number % 2, drawing(number)) for number in range(50)]
    splits = icons._split(items, np.random.default_rng(0))
    check_no_leak(splits)
    assert sum(len(split) for split in splits.values()) == 300
    assert sum(len(set(split.groups.tolist())) for split in splits.values()) == 200


def test_a_drawing_with_two_labels_is_dropped():
    items = [(f"icon{number}", number % 2, drawing(number)) for number in range(40)]
    items += [("twin", 1, drawing(0)), ("broken", 0, None)]
    splits = icons._split(items, np.random.default_rng(0))
    assert sum(len(split) for split in splits.values()) == 39


def test_svg_and_png_are_drawn_on_white_in_the_middle():
    pytest.importorskip("cairosvg")
    svg = icons.svg_of({"body": '<rect width="16" height="16" fill="#ff0000"/>'}, {"width": 16})
    stream = io.BytesIO()
    Image.new("RGBA", (48, 48), (255, 0, 0, 255)).save(stream, "PNG")
    for content in (svg, stream.getvalue()):
        image = icons.draw(content)
        assert image.shape == (56, 56, 3)
        assert image[0, 0].tolist() == [255, 255, 255]
        assert image[28, 28].tolist() == [255, 0, 0]


def test_what_cannot_be_drawn_is_none():
    assert icons.draw(b"<svg") is None
    assert icons.draw(b"\x89PNG broken") is None
