"""Random models of the paper's architectures, with differences as fine-tuning leaves them.

A base has transformers' own random weights. In each matrix a fine-tuned copy differs from it by
`U S V'`: S decays as the differences of the suite of the same kind do (`spectra`), U and V are
random orthonormal factors, and the norm is that suite's, too. Random signs, cosine transforms and
permutations make the factors, in n log n where a QR takes n cubed; the singular values are exactly
those asked for. All other parameters, vocabulary tables and position embeddings among them, differ
by noise of the same relative norm. Tasks are independent of each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.paper_size.spectra import load_curves, shape_of, spectrum
from cart_plugin.merging.tensors import is_decomposed

BASE = "base"
FORMAT = 1  # of what is written; raised when the weights change


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        title: its name in tables.
        model: the class in transformers.
        config: of it, beyond its own defaults.
        suite: whose differences it has.
        pool: FusionBench's model pool for it.
        loading: what the pool passes to `from_pretrained`.
        options: of the pool.
    """

    title: str
    model: str
    config: Mapping[str, Any]
    suite: str
    pool: str = "CLIPVisionModelPool"
    loading: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> torch.nn.Module:
        """A model with random weights, in fp32."""
        import transformers

        which = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: torch.nn.Module = which(which.config_class(**self.config), **self.loading)
        return made.eval()


KINDS = {
    "b32": Kind("CLIP ViT-B/32", "CLIPVisionModel", {}, "vision"),
    "l14": Kind(
        "CLIP ViT-L/14",
        "CLIPVisionModel",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "vision",
    ),
    "roberta": Kind(
        "RoBERTa-base",
        "RobertaModel",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        "text",
        "SequenceClassificationModelPool",
        {"add_pooling_layer": False},
        {"tokenizer": None},
    ),
}
TINY = {
    "b32": Kind(
        "CLIP, tiny",
        "CLIPVisionModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
        },
        "vision",
    ),
    "roberta": Kind(
        "RoBERTa, tiny",
        "RobertaModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 48,
        },
        "text",
        "SequenceClassificationModelPool",
        {"add_pooling_layer": False},
        {"tokenizer": None},
    ),
}


def shaped(shape: Sequence[int], values: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix with given singular values and random singular vectors.

    Args:
        shape: (m, n).
        values: (min(m, n),).
        generator: of the vectors.
    """
    rows, columns = shape
    matrix = torch.zeros(rows, columns)
    places = torch.randperm(rows, generator=generator)[: len(values)]
    others = torch.randperm(columns, generator=generator)[: len(values)]
    matrix[places, others] = values
    return _mixed(_mixed(matrix, generator).mT.contiguous(), generator).mT


def _mixed(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix times this one.

    Twice signs and a cosine transform, a permutation between: one round spreads each unit vector
    over all places, the second one hides the waves.
    """
    from scipy.fft import dct

    rows = len(matrix)
    for _ in range(2):
        signs = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
        mixed = dct((matrix * signs).numpy(), axis=0, norm="ortho", overwrite_x=True)
        matrix = torch.from_numpy(mixed)[torch.randperm(rows, generator=generator)]
    return matrix


def tuned_state(kind: Kind, base: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The weights of a fine-tuned copy.

    Args:
        kind: of the models.
        base: the base's weights.
        index: of the copy, which is all that its differences depend on.
    """
    curves = load_curves(kind.suite)
    generator = torch.Generator().manual_seed(1 + index)
    found = {}
    for name, start in base.items():
        if not start.is_floating_point():
            found[name] = start
            continue
        curve = curves["square"]
        if start.ndim == 2 and is_decomposed(name, start.shape):
            curve = curves[shape_of(start)]
            values = spectrum(curve, min(start.shape))
            difference = shaped(start.shape, values, generator)
        else:
            noise = torch.randn(start.shape, generator=generator)
            difference = noise / noise.norm()
        # Fresh biases are zero: what a unit of theirs would move by counts, then.
        size = start.norm() if start.any() else start.numel() ** 0.5 * 0.01
        found[name] = start + difference * (curve["relative_norm"] * size)
    return found


def folder_of(kind: Kind) -> Path:
    """Where models of a kind are kept, however many of them."""
    identity = {
        "model": kind.model,
        "config": dict(kind.config),
        "curves": load_curves(kind.suite),
        "format": FORMAT,
    }
    return cache_root() / "paper-size" / settings_hash(identity)


def write_models(kind: Kind, count: int, told: Callable[[int], None] = lambda _: None) -> Path:
    """Write the base and fine-tuned copies in fp32, those that are not there; one in memory.

    Args:
        kind: of the models.
        count: of copies.
        told: takes how many models there are, after each.

    Returns:
        The folder, with `base`, `task0`, `task1`, ...

    Raises:
        OSError: the disk is full.
    """
    folder = folder_of(kind)
    model: Any = kind.build(seed=0)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(-1, count):
        place = folder / (BASE if index < 0 else f"task{index}")
        if read_manifest(place) is None:
            if index >= 0:
                model.load_state_dict(tuned_state(kind, base, index))
            with new_folder(place) as target:
                # One file, under the model's own names.
                model.save_pretrained(target, save_original_format=False)
                write_json(target / MANIFEST, {"kind": kind.title, "index": index})
        told(index + 2)
    return folder


def bytes_of(kind: Kind) -> int:
    """Bytes of a model's weights, without making it."""
    with torch.device("meta"):
        model = kind.build(seed=0)
    return sum(value.numel() * value.element_size() for value in model.parameters())


def remove_models() -> None:
    """Remove all models of this benchmark from the cache."""
    shutil.rmtree(cache_root() / "paper-size", ignore_errors=True)


def pool_config(kind: Kind, folder: Path, count: int) -> dict[str, Any]:
    """FusionBench's config of a model pool with the base and the first copies."""
    names = {"_pretrained_": BASE} | {f"task{index}": f"task{index}" for index in range(count)}
    models: dict[str, Any] = {}
    for name, place in names.items():
        if kind.pool == "CLIPVisionModelPool":
            models[name] = str(folder / place)
        else:
            models[name] = {
                "_target_": f"transformers.{kind.model}.from_pretrained",
                "pretrained_model_name_or_path": str(folder / place),
                **kind.loading,
            }
    return {
        "_target_": f"fusion_bench.modelpool.{kind.pool}",
        "_recursive_": False,
        "models": models,
        **kind.options,
    }
