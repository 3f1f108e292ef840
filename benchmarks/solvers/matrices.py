"""Matrices to decompose, and how far a truncated decomposition of one is from the best.

All figures refer to a reference in fp64: leading eigenvectors of the Gram matrix of the short
side, which keeps about eight digits of whatever fp32 can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import scipy.linalg
import torch
from torch import Tensor

from benchmarks.demo.models import find_demo_models

REAL = "real delta"
SPECTRA = ("power law 0.5", "power law 1", "low rank + noise", "flat", REAL)
BF16 = ", bf16"  # at a spectrum's end: rounded as a model stores it

# Where the demo's encoders have a matrix of the shape.
_REAL_TENSORS = {
    (384, 384): "encoder.layer.6.attention.q_proj.weight",
    (384, 1536): "encoder.layer.6.mlp.fc2.weight",
}


class MatrixMaker:
    """Makes matrices ``(m, n)`` of each spectrum; they share their random singular vectors."""

    def __init__(self, m: int, n: int, seed: int = 0, device: str = "cpu") -> None:
        self.m, self.n, self.seed, self.device = m, n, seed, device

    def make(self, spectrum: str) -> Tensor | None:
        """The matrix in fp32 (or bf16); None for the real delta where no checkpoint has it."""
        if spectrum.endswith(BF16):
            found = self.make(spectrum.removesuffix(BF16))
            return None if found is None else found.bfloat16()
        if spectrum == REAL:
            return _real_delta(self.m, self.n)
        if spectrum == "flat":
            return self._gaussian(self.m, self.n)
        rank = min(self.m, self.n)
        index = torch.arange(1, rank + 1, dtype=torch.float32, device=self.device)
        if spectrum == "power law 0.5":
            return self._with_values(index**-0.5)
        if spectrum == "power law 1":
            return self._with_values(index**-1)
        if spectrum != "low rank + noise":
            raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}, got {spectrum!r}")
        # A sixteenth of the directions holds nine tenths of the energy.
        low = self._with_values(index[: max(1, rank // 16)] ** -0.5)
        noise = self._gaussian(self.m, self.n)
        return low + noise * (low.norm() / noise.norm() / 3)

    def _gaussian(self, rows: int, columns: int, stream: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + stream)
        return torch.randn(rows, columns, generator=generator).to(self.device)

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        rank = min(self.m, self.n)
        left = torch.linalg.qr(self._gaussian(self.m, rank, stream=1))[0]
        return left, torch.linalg.qr(self._gaussian(self.n, rank, stream=2))[0]

    def _with_values(self, values: Tensor) -> Tensor:
        left, right = (side[:, : len(values)] for side in self._vectors)
        return (left * values) @ right.mT


def _real_delta(m: int, n: int) -> Tensor | None:
    """A centred task vector of the demo's first task."""
    from safetensors import safe_open

    models = find_demo_models()
    if models is None or (m, n) not in _REAL_TENSORS:
        return None
    tensors = []
    for folder in models[1:]:
        with safe_open(folder / "model.safetensors", "pt") as handle:
            tensors.append(handle.get_tensor(_REAL_TENSORS[m, n]).float())
    return tensors[0] - torch.stack(tensors).mean(0)


@dataclass(frozen=True)
class Accuracy:
    """How far a truncated matrix ``R`` of ``X`` is from the best one of its rank, ``R_k``.

    Attributes:
        error: ``||R - R_k||_F / ||R_k||_F``.
        excess: ``||X - R||_F^2 / ||X - R_k||_F^2 - 1``: residual energy beyond the optimum.
    """

    error: float
    excess: float


class Reference:
    """The best approximations of a matrix at all ranks up to one, in fp64.

    Args:
        x: ``(m, n)`` in fp32 or bf16, on a CPU or GPU.
        largest: the largest rank that will be asked for.
    """

    def __init__(self, x: Tensor, largest: int) -> None:
        self.tall = x.shape[0] > x.shape[1]
        self.x = (x.mT.contiguous() if self.tall else x).float()
        wide = self.x.double()
        gram = wide @ wide.mT
        m = len(gram)
        self.energy = float(gram.trace())
        if gram.is_cuda:
            self.left = torch.linalg.eigh(gram)[1][:, m - largest :].flip(1)
        else:
            _, vectors = scipy.linalg.eigh(
                gram.numpy(),
                subset_by_index=(m - largest, m - 1),
                overwrite_a=True,
                check_finite=False,
            )
            self.left = torch.from_numpy(vectors).flip(1)
        self.right = self.left.mT @ wide

    def accuracy(self, u: Tensor, s: Tensor, vh: Tensor) -> Accuracy:
        """Compare the truncated matrix ``u diag(s) vh`` with the best one of rank ``len(s)``.

        The matrices themselves are never formed: with the reference ``L Q``, ``L^T L = 1``, and
        the candidate ``U P``, all that is needed are inner products of their factors, and of
        ``U``'s part outside ``L`` with ``X``.
        """
        if self.tall:
            u, vh = vh.mT, u.mT
        k = len(s)
        left, right = self.left[:, :k], self.right[:k]
        outer = u.double()
        inner = s.double()[:, None] * vh.double()
        overlap = left.mT @ outer
        best = float(right.square().sum())
        own = float(((outer.mT @ outer) * (inner @ inner.mT)).sum())
        common = float((overlap.mT * (inner @ right.mT)).sum())
        distance = max(own + best - 2 * common, 0.0)
        # ||X - R||^2 - ||X - R_k||^2 = ||R - R_k||^2 - 2 <X - R_k, R>, where no digits cancel.
        outside = (outer - left @ overlap).to(self.x.dtype)
        gained = float(((outside.mT @ self.x).double() * inner).sum())
        return Accuracy((distance / best) ** 0.5, (distance - 2 * gained) / (self.energy - best))
