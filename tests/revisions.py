"""`python -m tests.revisions`: figures that stand for the numbers of each room's REVISION.

Measurements of one revision are kept as long as it lasts, so these figures must not move while it
does. Run this after raising a REVISION; the test next door compares.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch

from cart_plugin import (
    CartSettings,
    RankRule,
    adapters,
    compress,
    linalg,
    merge_state_dicts,
    merge_tensors,
    merging,
    truncated_svd,
)
from cart_plugin.adapters import merge_adapters
from cart_plugin.checkpoints.files import write_json
from cart_plugin.compress import compress as compress_models
from cart_plugin.inspect import measures
from cart_plugin.inspect.state_dicts import records_of
from cart_plugin.linalg.svd import SOLVERS
from cart_plugin.merging.indexing import index_tensors
from tests.adapters.lora import change_tensors, save_base, save_loras, state
from tests.compress.models import save_tasks
from tests.support import power_law, random, with_spectrum

FILE = Path(__file__).with_name("revisions.json")


def linalg_figures() -> dict[str, float]:
    """Energies that each solver keeps of a few matrices."""
    figures = {}
    for m, n in ((96, 128), (640, 512)):
        x = with_spectrum(power_law(min(m, n), 0.5), m, n, seed=m)
        for svd in SOLVERS:
            kept = truncated_svd(x, RankRule(0.08), svd=svd)
            figures[f"{svd} {m}x{n}"] = float(kept.S.double().square().sum())
        figures[f"energy {m}x{n}"] = truncated_svd(x, RankRule(energy=0.8)).rank
    return figures


def merging_figures() -> dict[str, float]:
    """Sums over merged tensors, weighted at random so that any entry shows."""
    figures = {}
    weights = random(24, 40, seed=100)
    tensors = [random(24, 40, seed=seed) for seed in range(4)]
    base = random(24, 40, seed=9)
    kinds = {
        "cart": CartSettings(rank_ratio=0.2, lambda_=1.5),
        "cart energy": CartSettings(energy=0.6),
        "cart base": CartSettings(rank=3, center="base"),
        "cart_auto": CartSettings(lambda_="auto", center="average"),
        "cart_auto informed": CartSettings(lambda_="auto"),
        "cart_auto base": CartSettings(lambda_="auto", center="base"),
    }
    for name, settings in kinds.items():
        merged = merge_tensors(tensors, settings, weights=[1, 2, 1, 1], base=base, name="a.weight")
        figures[name] = float((merged.double() * weights).sum())
    shapes = {
        "model.embed_tokens.weight": (20, 12),
        "layers.0.mlp.experts.up_proj": (3, 16, 24),
        "conv.weight": (8, 6, 3),
        "layers.0.mlp.up_proj.bias": (2, 16),
        "encoder.position_embeddings.weight": (9, 12),
        "layers.0.norm.weight": (12,),
    }
    states = [
        {name: random(*shape, seed=10 * seed) for name, shape in shapes.items()}
        for seed in range(3)
    ]
    settings = CartSettings(rank_ratio=0.25, lambda_=1.5)
    for name, tensor in merge_state_dicts(states, settings).items():
        figures[name] = float((tensor.double() * random(*tensor.shape, seed=7)).sum())
    indexed = index_tensors(tensors, CartSettings(rank=5), name="a.weight")
    figures["indexing"] = float((indexed.restored(2).double() * weights).sum())
    return figures


def compress_figures() -> dict[str, float]:
    """Sizes and errors of three tiny models as a base and adapters."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        models = save_tasks(Path(folder), "llama", num_hidden_layers=1)
        for name, options in {"ratio": {"rank_ratio": 0.25}, "size": {"target_size": 0.8}}.items():
            report = compress_models(models, Path(folder) / name, **options)
            figures[f"{name} error"] = report.total(0).error
            # Without the configs: they hold the folder's path.
            files = sorted((Path(folder) / name).rglob("*.safetensors"))
            figures[f"{name} bytes"] = sum(file.stat().st_size for file in files)
    return figures


def inspect_figures() -> dict[str, float]:
    """What is said of small and large (sketched) weights, around the average and from a base."""
    figures = {}
    sides = {"layers.0.up.weight": (24, 40), "layers.1.up.weight": (512, 576)}
    base, *dicts = (
        {
            name: with_spectrum(power_law(min(m, n), 0.7), m, n, seed=10 * seed)
            for name, (m, n) in sides.items()
        }
        for seed in range(4)
    )
    named = {str(number): own for number, own in enumerate(dicts)}
    for found in records_of(named, base=base):
        name = found["tensor"]
        for kind in ("centred", "from_base"):
            for curve in ("R", "I"):
                figures[f"{name} {kind} {curve}"] = sum(found[kind][curve])
        for key in ("effective_rank", "energy", "moved"):
            figures[f"{name} {key}"] = sum(found[key])
        for key in ("row_overlap", "column_overlap"):
            figures[f"{name} {key}"] = found[key][0][1]
        for method, judged in found["methods"].items():
            figures[f"{name} {method}"] = judged["kept"][0] + 2 * judged["lost"][1]
    return figures


def adapters_figures() -> dict[str, float]:
    """Sums over adapters merged, of which one has directions of next to no weight."""
    figures = {}
    decay = torch.logspace(0, -3, 6)
    with tempfile.TemporaryDirectory() as folder:
        base = save_base(Path(folder), "llama")
        folders, start = save_loras(Path(folder), base, r=6), state(base)
        change_tensors(
            folders[0],
            lambda held: [held[name].mul_(decay) for name in held if "lora_B" in name],
        )
        for method, rank in itertools.product(("auto", "cart", "linear"), ("full", None)):
            out = Path(folder) / f"{method}-{rank}"
            merge_adapters(folders, out, method=method, rank=rank)
            figures[out.name] = sum(
                float(((one - start[name]).double() * random(*one.shape, seed=7)).sum())
                for name, one in state(base, out).items()
            )
    return figures


ROOMS = {
    "linalg": (linalg, linalg_figures),
    "merging": (merging, merging_figures),
    "adapters": (adapters, adapters_figures),
    "compress": (compress, compress_figures),
    "inspect": (measures, inspect_figures),
}


if __name__ == "__main__":
    write_json(
        FILE,
        {
            name: {"revision": room.REVISION, "figures": figures()}
            for name, (room, figures) in ROOMS.items()
        },
    )
