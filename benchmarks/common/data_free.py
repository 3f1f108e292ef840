"""Data-free methods that no recipe of mergekit names, on whole models: for suites that compare.

What each makes of a weight is in `benchmarks.common.peers`, mergekit or FusionBench; what is no
matrix is averaged, as our methods do.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.doge import doge
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

Tensors = Mapping[str, Tensor]
OfTaus = Callable[..., Tensor]
"""Takes the task vectors of a weight, matrices (m, n), and options; gives what is added to the
base."""


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


def svc_of_sum(taus: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """SVC after task arithmetic, whose scale decides only where values are limited."""
    return peers.svc(scaled_sum(taus, scale), taus)


def svc_of_tsvm(taus: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """SVC after TSV-M, as its authors set it there: values fall only."""
    return peers.svc(scale * tsvm([factored(tau) for tau in taus]), taus, 1.0)


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
    "SVC, task arithmetic": svc_of_sum,
    "SVC, TSV-M": svc_of_tsvm,
    "WUDI": wudi,
}
DOGE = "DOGE"  # the only one that looks at all weights at once


def merged_by(
    method: str, tuned: Sequence[Tensors], base: Tensors, **options: float
) -> dict[str, Tensor]:
    """Merge whole models by a method of `OF_TAUS` or by `DOGE`.

    Args:
        method: its name.
        tuned: the models' state dicts.
        base: theirs.
        **options: the method's own.
    """
    if method != DOGE:
        return merged_state(partial(OF_TAUS[method], **options), tuned, base)
    matrices = [
        taus
        for name, start in base.items()
        if is_decomposed(name, start.shape)
        for taus in _of_stack(name, start, tuned)
    ]
    added = iter(doge(matrices, **options))
    return merged_state(lambda _: next(added), tuned, base)  # which takes them in this order


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
            if is_decomposed(name, start.shape):
                added = torch.stack([of_taus(taus) for taus in _of_stack(name, start, tuned)])
                merged[name] = start + added.view(start.shape)
            else:
                merged[name] = start + torch.stack(_taus(name, start, tuned)).mean(dim=0)
    return merged


def _taus(name: str, start: Tensor, tuned: Sequence[Tensors]) -> list[Tensor]:
    return [one[name].float() - start.float() for one in tuned]


def _of_stack(name: str, start: Tensor, tuned: Sequence[Tensors]) -> list[list[Tensor]]:
    """The task vectors of each matrix of a weight."""
    shape = matrix_shape(name, start.shape)
    stacks = zip(*(tau.reshape(shape) for tau in _taus(name, start, tuned)), strict=True)
    return [list(taus) for taus in stacks]
