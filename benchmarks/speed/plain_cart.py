"""CART as one would write it down from the paper, with full SVDs, for comparison only.

    python benchmarks/speed/plain_cart.py RECIPE OUT [OPTIONS]

runs `mergekit-yaml` with one more merge method, ``plain_cart``.
"""

import torch
from mergekit.merge_methods import InputContract, TensorGroup, merge_method, register
from mergekit.scripts.run_yaml import main


@merge_method(
    name="plain_cart",
    pretty_name="CART with full SVDs",
    reference_url="https://arxiv.org/abs/2412.12153",
    contract=InputContract(min_inputs=2),
)
def plain_cart(group: TensorGroup, rank_ratio: float = 0.08, scale: float = 1.0) -> torch.Tensor:
    """``avg + scale * sum_t SVD_k(W_t - avg)`` for matrices, ``avg`` for all else."""
    tensors = torch.stack([entry.tensor.float() for entry in group.entries])
    average = tensors.mean(0)
    merged = average.clone()
    if average.ndim == 2 and group.metadata.vocabulary_axis is None:
        k = max(1, int(rank_ratio * min(average.shape)))
        for tensor in tensors:
            u, s, vh = torch.linalg.svd(tensor - average, full_matrices=False)
            merged += scale * (u[:, :k] * s[:k]) @ vh[:k]
    return merged.to(group.entries[0].tensor.dtype)


register(plain_cart)

if __name__ == "__main__":
    main()
