"""Data-free methods that no recipe of mergekit names, on whole models: for suites that compare.

What each makes of a weight is in `benchmarks.common.peers`, mergekit or FusionBench; what is no
matrix is averaged, as our methods do.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.cache import MANIFEST, new_folder, read_manifest, settings_hash, write_json
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

Tensors = Mapping[str, Tensor]
OfTaus = Callable[[Sequence[Tensor]], Tensor]
"""Takes the task vectors of a weight, matrices (m, n); gives what is added to the base."""
WEIGHTS = "model.safetensors"


def factored(matrix: Tensor) -> LowRank:
    """All singular directions of a matrix."""
    return LowRank(*torch.linalg.svd(matrix, full_matrices=False))


def tsvm(tasks: Sequence[LowRank]) -> Tensor:
    """TSV-M (arXiv 2412.00081): as many singular triples a task as fit side by side, whitened."""
    count = max(1, len(tasks[0].S) // len(tasks))
    left = torch.cat([task.U[:, :count] for task in tasks], dim=1)
    right = torch.cat([task.Vh[:count].mT for task in tasks], dim=1)
    values = torch.cat([task.S[:count] for task in tasks])
    return (peers.polar(left) * values) @ peers.polar(right).mT


def sparse(taus: Sequence[Tensor], *, random: bool, density: float) -> Tensor:
    """TIES of matrices, or DARE-TIES (`random`), by mergekit's functions; scale 1.

    What is elected is averaged, as mergekit does for TIES. DARE's masks go on from torch's seed.
    """
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    which = SparsificationMethod.random if random else SparsificationMethod.magnitude
    rescale = RescaleNorm.l1 if random else None
    kept = torch.stack(
        [sparsify(tau, density=density, method=which, rescale_norm=rescale) for tau in taus]
    )
    mask = get_mask(kept)
    return (kept * mask).sum(dim=0) / mask.sum(dim=0).clamp_min(1)


def _by_fusion_bench(
    merge: Callable[..., Mapping[str, Tensor]], taus: Sequence[Tensor], **options: float
) -> Tensor:
    """One of its functions of task vectors, without the lines that it prints for each matrix."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return merge([{"w": tau} for tau in taus], accelerator="cpu", **options)["w"].detach()


def iso_c(taus: Sequence[Tensor]) -> Tensor:
    """FusionBench's Iso-C (arXiv 2502.04959) of matrices, scale 1."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as merge

    return _by_fusion_bench(merge, taus)


def iso_cts(taus: Sequence[Tensor]) -> Tensor:
    """FusionBench's Iso-CTS (arXiv 2502.04959) of matrices, scale 1, with the paper's fraction.

    In fp64: LAPACK's fp32 SVD of its nearly orthogonal bases does not always converge.
    """
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts as merge

    exact = [tau.double() for tau in taus]
    return _by_fusion_bench(merge, exact, common_space_fraction=0.8).to(taus[0].dtype)


def wudi(taus: Sequence[Tensor], steps: int = 300, rate: float = 1e-5) -> Tensor:
    """WUDI (arXiv 2503.08099) of matrices, step by step what FusionBench's does; 300 by default.

    The gradient of ``sum_t ||(M - tau_t) tau_t'||^2 / ||tau_t||^2`` comes from the sums of ``C_t =
    tau_t'tau_t / ||tau_t||^2`` and of ``tau_t C_t``, so that a step costs one product of matrices
    and not four a model. A model that left a matrix at its base has no part in its sums.

    Args:
        taus: task vectors, (m, n) each.
        steps: of Adam, from the sum of the task vectors.
        rate: its learning rate.

    Returns:
        The merged task vector, (m, n).
    """
    moved = [tau for tau in taus if tau.any()]
    if not moved:
        return torch.zeros_like(taus[0])
    grams = [tau.mT @ tau / tau.square().sum() for tau in moved]
    gram = torch.stack(grams).sum(dim=0)
    target = torch.stack([tau @ own for tau, own in zip(moved, grams, strict=True)]).sum(dim=0)
    merged = torch.nn.Parameter(torch.stack(moved).sum(dim=0))
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = 2 * (merged.detach() @ gram - target)
        optimizer.step()
    return merged.detach()


def scaled_sum(taus: Sequence[Tensor], scale: float) -> Tensor:
    """Task arithmetic of matrices."""
    return scale * torch.stack(list(taus)).sum(dim=0)


OF_TAUS: dict[str, OfTaus] = {
    "ASWUDI": peers.aswudi,
    "SWUDI": peers.swudi,
    "TSV-M": lambda taus: tsvm([factored(tau) for tau in taus]),
    "ACE": peers.ace,
    "TIES": partial(sparse, random=False, density=0.2),
    "DARE-TIES": partial(sparse, random=True, density=0.5),
    "Iso-C": iso_c,
    "Iso-CTS": iso_cts,
    "DC-Merge": peers.dc_merge,
    "WUDI": wudi,
}
# Those that mergekit has not: `compare` judges them as they are.
BESIDE_MERGEKIT = ("TSV-M", "Iso-C", "ASWUDI", "SWUDI", "ACE", "DC-Merge")


def merged_state(of_taus: OfTaus, tuned: Sequence[Tensors], base: Tensors) -> dict[str, Tensor]:
    """Merge whole models, in fp32; what is no matrix is averaged.

    Args:
        of_taus: for each matrix, of a stack by itself.
        tuned: the models' state dicts.
        base: theirs. What the models' files leave out, such as old buffers, is kept as it is.
    """
    merged = {}
    torch.manual_seed(0)  # once, so that the masks of two weights of a shape differ
    with torch.no_grad():
        for name, stored in base.items():
            if any(name not in one for one in tuned):
                merged[name] = stored
                continue
            start = stored.float()
            taus = [one[name].float() - start for one in tuned]
            if is_decomposed(name, start.shape):
                shape = matrix_shape(name, start.shape)
                stacks = zip(*(tau.reshape(shape) for tau in taus), strict=True)
                added = torch.stack([of_taus(matrices) for matrices in stacks])
                merged[name] = start + added.view(start.shape)
            else:
                merged[name] = start + torch.stack(taus).mean(dim=0)
    return merged


def merged_models(
    methods: Sequence[str], tuned: Sequence[Path], base: Path, folder: Path
) -> dict[str, Path]:
    """Folders of models merged by methods of `OF_TAUS`, unless they are there; by method.

    Each has the files of its base (config, tokenizer) and its own weights, in fp32.

    Args:
        methods: by name.
        tuned: folders of models with one weight file.
        base: that of their base.
        folder: where the merged models are kept.
    """
    identity = {
        "models": [str(path) for path in tuned],
        "base": str(base),
        "peers": peers.REVISION,
    }
    found = {
        method: folder / f"{method.lower()}-{settings_hash([method, identity])}"
        for method in methods
    }
    missing = [method for method, path in found.items() if read_manifest(path) is None]
    if missing:
        states = [load_file(path / WEIGHTS) for path in tuned]
        start = load_file(base / WEIGHTS)
        for method in missing:
            with new_folder(found[method]) as target:
                for path in base.iterdir():
                    if path.is_file() and path.name not in (WEIGHTS, MANIFEST):
                        shutil.copy(path, target / path.name)
                merged = merged_state(OF_TAUS[method], states, start)
                save_file(merged, target / WEIGHTS, metadata={"format": "pt"})
                write_json(target / MANIFEST, identity | {"method": method})
    return found
