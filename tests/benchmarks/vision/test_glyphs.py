"""Glyph tasks: families that look alike stay together, and the pictures are what they should be."""

import numpy as np
import pytest

from benchmarks.vision import glyphs
from benchmarks.vision.splits import check_no_leak
from tests.benchmarks.synthetic import LETTERS, write_font


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Twelve families; `Copy` is family 0 under another name, a little bolder."""
    folder = tmp_path_factory.mktemp("fonts")
    for design in range(12):
        write_font(folder / f"font{design:02}.ttf", f"Family {'abcdefghijkl'[design]}", design)
    write_font(folder / "copy.ttf", "Copy", 0, weight=66)
    (folder / "broken.ttf").write_bytes(b"not a font")
    return folder


def test_every_readable_face_is_found_once(fonts):
    faces = glyphs.find_faces([fonts], LETTERS)
    assert len(faces) == 13
    assert len({face.family for face in faces}) == 13


def test_faces_without_all_letters_are_left_out(fonts):
    assert glyphs.find_faces([fonts], LETTERS + "z") == []


def test_a_copy_under_another_name_is_in_the_same_group(fonts):
    faces = glyphs.find_faces([fonts], LETTERS)
    signatures = np.stack([glyphs.signature(glyphs.letter_masks(face, LETTERS)) for face in faces])
    groups = dict(
        zip((face.family for face in faces), glyphs.group_faces(faces, signatures), strict=True)
    )
    assert groups["Copy"] == groups["Family a"]
    assert len(set(groups.values())) == 12


@pytest.mark.parametrize(
    ("family", "stem"),
    [
        ("BPG Nateli Caps GPL&GNU", "bpg nateli"),
        ("BPG Nateli Condenced GPL&GNU", "bpg nateli"),
        ("Kanit ExtraLight", "kanit"),
        ("Noto Serif Thai", "noto thai"),
        ("Sans", "sans"),
    ],
)
def test_style_words_are_no_part_of_the_family(family, stem):
    assert glyphs.family_stem(family) == stem


def test_a_family_with_many_faces_does_not_outweigh_the_rest(fonts):
    face = glyphs.find_faces([fonts], LETTERS)[0]
    faces = [glyphs.Face(face.path, 0, "One Bold", str(number)) for number in range(20)]
    kept = glyphs.limit_faces(faces, np.random.default_rng(0), most=6)
    assert len(kept) == 6


def test_no_family_is_in_two_splits_and_the_seed_decides(fonts):
    first, again, other = (
        glyphs.build(LETTERS, {"fonts": fonts}, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    check_no_leak(first)
    for name, split in first.items():
        assert split.images.shape[1:] == (56, 56, 3)
        assert split.images.dtype == np.uint8
        assert set(split.labels) == set(range(len(LETTERS)))
        assert len(split) >= glyphs.TARGETS[name]
        assert np.array_equal(split.images, again[name].images)
    assert not np.array_equal(first["test"].groups, other["test"].groups)
