"""Singular values without vectors: spectra, and the ranks that hold a share of their energy."""

from __future__ import annotations

import torch
from torch import Tensor

from cart_plugin.linalg.gram import eigvalsh, total_energy
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rules import energy_rank


def spectrum(matrices: Tensor) -> Tensor:
    """Squared singular values of ``(stack, m, n)``, summed over the stack, descending; on CPU."""
    if matrices.device.type == "mps":  # it has no eigensolver
        matrices = matrices.cpu()
    short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    total = torch.zeros(short.shape[-2], dtype=torch.float64, device="cpu")
    with torch.no_grad(), full_precision(matrices.device):
        for matrix in short:
            # Of entries of 1e-20 the squares leave fp32.
            largest = float(matrix.abs().max())
            if largest:
                scaled = matrix / largest
                values = eigvalsh(scaled @ scaled.mT).cpu().double().flip(0).clamp_min(0)
                total += values * largest**2
    return total


def energy_rank_of(x: Tensor, energy: float) -> int:
    """The smallest rank at which ``x`` ``(m, n)`` keeps a share of its squared singular values."""
    # fp32 tells shares apart by about 1e-6, which is too coarse close to all of them.
    dtype, slack = (torch.float64, 1e-12) if energy > 1 - 1e-3 else (x.dtype, 1e-6)
    x = x.to(dtype)
    values = eigvalsh(x @ x.mT).double().flip(0).clamp_min(0)
    return energy_rank(values, energy, float(total_energy(x)), slack=slack)
