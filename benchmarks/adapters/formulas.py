"""Published ways to merge LoRA adapters, as functions of one weight's adapters.

Each takes the adapters' differences ``tau_t = B_t A_t`` of one weight as `Factors`, and gives the
merged difference ``(m, n)`` at its natural scale, in fp32. They are written from the papers'
formulas; where a paper leaves something open, the docstring says what was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.data_free import factored, tsvm
from benchmarks.common.peers import elected, largest

REVISION = 1  # raised when a way gives other weights

_LEAST = 1e-6  # of the largest singular value: what is below is rounding


class Factors(NamedTuple):
    """An adapter's difference of one weight: ``left @ right``.

    Attributes:
        left: ``(m, r)``, LoRA's B times its scale.
        right: ``(r, n)``, LoRA's A.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The difference, ``(m, n)``."""
        return self.left @ self.right


def knots_ties(adapters: Sequence[Factors], density: float = 0.2) -> Tensor:
    """KnOTS-TIES (arXiv 2410.19735): TIES in a basis that all adapters share.

    With ``[tau_1 .. tau_T] = U S [V_1 .. V_T]`` the matrices ``S V_t`` of T tasks are merged by
    TIES (the largest entries of each, the sum's sign, the mean of what has it), here weight by
    weight; the result is U times that.

    Args:
        adapters: of one weight.
        density: share of the entries that is kept of each. TIES' 0.2.
    """
    # All tau_t have their columns in the span of all B_t: that is a smaller decomposition.
    basis = torch.linalg.qr(torch.cat([one.left for one in adapters], dim=1))[0]
    together = torch.cat([(basis.mT @ one.left) @ one.right for one in adapters], dim=1)
    inner, values, right = torch.linalg.svd(together, full_matrices=False)
    left = basis @ inner
    known = values > _LEAST * values[0]
    parts = (values[known, None] * right[known]).chunk(len(adapters), dim=1)
    return left[:, known] @ elected(largest(torch.stack(parts), density))


def core_space_tsv(adapters: Sequence[Factors]) -> Tensor:
    """TSV-M (arXiv 2412.00081) of the adapters' cores (Core Space merging, arXiv 2509.17786)."""
    space = core_space(adapters)
    return space.left @ tsvm([factored(core) for core in space.cores]) @ space.right


def core_space_iso(adapters: Sequence[Factors]) -> Tensor:
    """Iso-C (arXiv 2502.04959) of the adapters' cores: the sum with equal singular values."""
    space = core_space(adapters)
    left, values, right = torch.linalg.svd(space.cores.sum(dim=0))
    return space.left @ (values.mean() * (left @ right)) @ space.right


class CoreSpace(NamedTuple):
    """The adapters of a weight in orthonormal bases: ``tau_t = left @ cores[t] @ right``.

    Attributes:
        left: ``(m, p)``; of all B side by side, of a subspace of theirs, or of the whole space.
        cores: ``(T, p, q)``.
        right: ``(q, n)``.
    """

    left: Tensor
    cores: Tensor
    right: Tensor


def core_space(adapters: Sequence[Factors]) -> CoreSpace:
    """The bases of Core Space merging (arXiv 2509.17786): of all B, and of all A."""
    left = torch.linalg.qr(torch.cat([one.left for one in adapters], dim=1))[0]
    right = torch.linalg.qr(torch.cat([one.right for one in adapters], dim=0).mT)[0].mT
    cores = [(left.mT @ one.left) @ (one.right @ right.mT) for one in adapters]
    return CoreSpace(left, torch.stack(cores), right)


def subspaces(adapters: Sequence[Factors], rank: int) -> CoreSpace:
    """The subspaces of Compress then Merge (CtM, ICML 2026): which hold most of all adapters.

    A partial Tucker decomposition of the cores, each over its norm: alternately the leading left
    singular vectors of all cores in the right subspace, and the other way round. Adapters are
    projected, so that the cores describe them in part only.

    Args:
        adapters: of one weight.
        rank: of the subspaces.
    """
    space = core_space(adapters)
    norms = space.cores.flatten(1).norm(dim=1)
    balanced = space.cores / torch.where(norms > 0, norms, 1.0)[:, None, None]
    right = _leading(balanced.mT, rank)
    held = torch.zeros(())
    for _ in range(100):
        left = _leading(balanced @ right, rank)
        right = _leading(balanced.mT @ left, rank)
        before, held = held, (left.mT @ balanced @ right).square().sum()
        if held - before <= 1e-6 * held:
            break
    cores = left.mT @ space.cores @ right
    return CoreSpace(space.left @ left, cores, right.mT @ space.right)


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of matrices ``(T, p, q)`` side by side."""
    together = matrices.permute(1, 0, 2).flatten(1)
    return torch.linalg.svd(together, full_matrices=False)[0][:, :rank]


def compress_then_merge(adapters: Sequence[Factors], rank: int, density: float = 0.2) -> Tensor:
    """CtM with TIES: the adapters in `subspaces` of a rank, merged there by TIES.

    Args:
        adapters: of one weight.
        rank: of the result.
        density: share of the entries that is kept of each core.
    """
    space = subspaces(adapters, rank)
    return space.left @ elected(largest(space.cores, density)) @ space.right


def pico(adapters: Sequence[Factors]) -> Tensor:
    """Pico with the mean: output directions that several adapters use count less.

    With ``[B_1 .. B_T] = U diag(s) V'`` and ``c_k = s_k^2 / sum s^2``, every B is scaled along u_k
    by ``1 / (1 + (T - 1) c_k)`` and then to its former norm; the mean of ``B_t A_t`` is taken.
    """
    left, values, _ = torch.linalg.svd(
        torch.cat([one.left for one in adapters], dim=1), full_matrices=False
    )
    shares = values.square() / values.square().sum()
    less = 1 / (1 + (len(adapters) - 1) * shares) - 1
    found = []
    for one in adapters:
        scaled = one.left + left @ (less[:, None] * (left.mT @ one.left))
        length = scaled.norm()
        found.append(scaled * (one.left.norm() / torch.where(length > 0, length, 1.0)) @ one.right)
    return torch.stack(found).mean(dim=0)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank by the sum of squares: a truncated SVD."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]
