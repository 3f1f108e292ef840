"""CART on one weight and on whole state dicts: centre, truncate, recombine.

For fine-tuned weights ``W_1 .. W_T`` of one tensor (arXiv 2412.12153, section 4)::

    centre = sum_t w_t W_t / sum_t w_t
    merged = centre + lambda * sum_t (w_t / mean(w)) * SVD_k(W_t - centre)

With ``lambda: auto`` the second term is the one of least interference between the tasks instead
(`cart_plugin.coefficients`), which has no scale to choose.
Tensors that are not decomposed end at the centre: the centred task vectors sum to zero.
"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cart_plugin.coefficients import AUTO_RANK_RATIO, least_interference
from cart_plugin.errors import CartError, CartWarning
from cart_plugin.inputs import (
    agreed_buffer,
    check_finite,
    check_inputs,
    check_kind,
    check_same_tensors,
    common_dtype,
    normalised,
)
from cart_plugin.lowrank import SOLVERS, LowRank, RankRule, truncated_svd

# Tables that are looked up by token or position, whatever the architecture calls them, and
# biases that a stack of experts makes two-dimensional. Their rows are not directions of a linear
# map, so the paper's argument (and the authors' code) leaves them to the average.
_AVERAGED_NAME = re.compile(
    r"(?:^|\.)(?:"
    r"embed_tokens(?:_per_layer)?|tok_embeddings|word_embeddings|token_embeddings?|"
    r"token_type_embeddings|rel_embeddings|"
    r"embed_in|embed_out|lm_head|wte|wpe|"
    r"(?:absolute_)?position_embeddings?|positional_embedding|pos_embed|embed_positions|"
    r"relative_attention_bias|relative_position_bias_table|rel_pos_[hw]|"
    r"(?:cls|class|mask|register|distillation)_(?:token|embedding)s?"
    r")(?:\.|$)"
    r"|(?:^|\.)embeddings\.weight$|^(?:\w+\.)?shared\.weight$|predictions\.decoder\.weight$"
    r"|(?:^|\.)(?:query_tokens|A_log)$"
    r"|bias$"
)
_CONVOLUTION_NAME = re.compile(r"conv", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CartSettings:
    """The parameters of CART that hold for all models.

    Attributes:
        rank_ratio: share of the singular directions to keep (`RankRule`). If none is given: 0.08,
            and 0.16 with ``lambda_="auto"``.
        rank: their number instead.
        energy: as many as hold this share of the squared singular values instead.
        lambda_: scale of the sum of truncated task vectors, or ``"auto"``: they are combined so
            that they interfere least (`cart_plugin.coefficients.least_interference`).
        center: ``"average"``, the weighted mean of the fine-tuned weights, or ``"base"``, the base
            model (the paper's uncentred ablation).
        svd: solver, one of `cart_plugin.lowrank.SOLVERS`; ``"auto"`` is ``"subspace"`` with
            ``lambda_="auto"``, which needs no singular vectors.
        seed: start of the randomised solvers, mixed with each tensor's name.

    Raises:
        CartError: a value of the wrong kind or out of range, or two rank rules at once.
    """

    rank_ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    lambda_: float | Literal["auto"] = 1.0
    center: Literal["average", "base"] = "average"
    svd: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        RankRule(self.rank_ratio, self.rank, self.energy)
        number = isinstance(self.lambda_, (int, float)) and not isinstance(self.lambda_, bool)
        if self.lambda_ != "auto" and not (number and math.isfinite(self.lambda_)):
            raise CartError(f"lambda must be a finite number or 'auto', got {self.lambda_!r}")
        if self.center not in ("average", "base"):
            raise CartError(f"center must be 'average' or 'base', got {self.center!r}")
        if self.svd not in SOLVERS:
            raise CartError(f"svd must be one of {', '.join(SOLVERS)}, got {self.svd!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise CartError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def rule(self) -> RankRule:
        """The rank rule that is given, or the default one."""
        if self.lambda_ == "auto" and self.rank_ratio is self.rank is self.energy is None:
            return RankRule(AUTO_RANK_RATIO)
        return RankRule(self.rank_ratio, self.rank, self.energy)

    @property
    def solver(self) -> str:
        """The solver that `svd` stands for."""
        return "subspace" if self.lambda_ == self.svd == "auto" else self.svd


def is_decomposed(name: str | None, shape: Sequence[int]) -> bool:
    """Whether CART decomposes a tensor, rather than averaging it.

    Args:
        name: the tensor's name in its checkpoint; None if it has none (its shape decides).
        shape: the tensor's shape.

    Returns:
        True for matrices, stacks of matrices (experts) and convolution kernels; False for
        vocabulary and position tables, biases, norms and whatever has no two sides above 1.
    """
    if name is not None and _AVERAGED_NAME.search(name):
        return False
    return len(shape) >= 2 and 0 not in shape and min(matrix_shape(name, shape)[1:]) > 1


def merge_tensors(
    tensors: Sequence[Tensor],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    name: str | None = None,
    models: Sequence[str] | None = None,
    decompose: bool | None = None,
) -> Tensor:
    """Merge the versions of one tensor that several fine-tuned models hold.

    Peak memory beyond the inputs is a few copies of one tensor in fp32, for any number of models:
    about five where an eighth of the directions or less is kept, up to thirteen where nearly all
    are, or with ``energy``. With ``lambda_="auto"`` it depends on their number, too, up to a limit
    (`cart_plugin.coefficients.least_interference`).

    Args:
        tensors: one a model, all of one shape, on one device. At least two.
        settings: parameters of the method; the defaults if None.
        weights: one a model: weights of the mean, and, scaled to mean 1, of each model's low-rank
            term. None means equal.
        base: the base model's tensor; needed by ``center="base"`` only.
        name: the tensor's name: decides what it is (see `is_decomposed`) and appears in errors.
        models: the models' names, for errors; their numbers if None.
        decompose: overrides `is_decomposed`.

    Returns:
        The merged tensor, in the dtype to which the inputs promote.

    Raises:
        CartError: fewer than two tensors, shapes that differ, values that are not finite or not
            floating point, weights that sum to nothing, a missing base, or a result that the
            inputs' dtype cannot hold.
    """
    settings = settings or CartSettings()
    models, where = check_inputs(tensors, base, settings.center, name, models)
    dtype = common_dtype(tensors)
    if tensors[0].numel() == 0:
        return tensors[0].to(dtype, copy=True)
    if decompose is None:
        decompose = is_decomposed(name, tensors[0].shape)
    if settings.rule.keeps_nothing:
        decompose = False

    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        shares = normalised(weights, len(tensors), where)
        around = base if decompose and settings.center == "base" else None
        centre = centre_of(tensors, shares, around, models, where)
        if decompose:
            merged = _add_low_rank(tensors, centre, shares, settings, name, models, where)
        else:
            merged = centre
        result = merged.to(dtype)
        # The sum alone is cheaper, but may overflow where no value does.
        if not bool(torch.isfinite(result.sum(dtype=merged.dtype)) or torch.isfinite(result).all()):
            raise CartError(
                f"{where}: the merged values leave the range of {dtype}; use a wider dtype "
                "(float32 or bfloat16)"
                + ("" if settings.lambda_ == "auto" else ", or a smaller lambda")
            )
        return result


def merge_state_dicts(
    state_dicts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Mapping[str, Tensor] | None = None,
    decompose: Callable[[str, torch.Size], bool] = is_decomposed,
) -> dict[str, Tensor]:
    """Merge whole state dicts, one tensor at a time.

    Args:
        state_dicts: one a model, or a mapping from the models' names to them; all with the same
            tensors. Lazily loading mappings work: each tensor is asked for once, when it is due.
        settings: parameters of the method; the defaults if None.
        weights: one a model, as in `merge_tensors`.
        base: the base model's state dict; needed by ``center="base"`` only.
        decompose: which tensors to decompose, by name and shape.

    Returns:
        The merged tensors, in the order of the first model. Integer tensors (buffers) are copied
        if all models agree on them.

    Raises:
        CartError: as `merge_tensors`, and for tensors that a model lacks.
    """
    named = (
        dict(state_dicts)
        if isinstance(state_dicts, Mapping)
        else {str(i): state_dict for i, state_dict in enumerate(state_dicts)}
    )
    models = list(named)
    if not models:
        raise CartError("CART needs at least two fine-tuned models, got none")
    settings = settings or CartSettings()
    holders = dict(named)
    if settings.center == "base" and base is not None:
        holders["the base model"] = base
    check_same_tensors(holders)
    merged = {}
    for name in named[models[0]]:
        tensors = [named[model][name] for model in models]
        if not any(tensor.is_floating_point() for tensor in tensors):
            merged[name] = agreed_buffer(tensors, models, name)
            continue
        merged[name] = merge_tensors(
            tensors,
            settings,
            weights=weights,
            base=base[name] if base is not None and settings.center == "base" else None,
            name=name,
            models=models,
            decompose=decompose(name, tensors[0].shape),
        )
    return merged


def _add_low_rank(
    tensors: Sequence[Tensor],
    centre: Tensor,
    shares: Sequence[float],
    settings: CartSettings,
    name: str | None,
    models: Sequence[str],
    where: str,
) -> Tensor:
    """``centre + lambda * T * sum_t share_t SVD_k(W_t - centre)``, for shares that sum to 1.

    With ``lambda: auto`` the truncated differences, so weighted, make the term of least
    interference.
    """
    shape = matrix_shape(name, centre.shape)
    if settings.center == "average":
        _, m, n = shape
        if settings.lambda_ != "auto" and settings.rule.fixed_rank(m, n) == min(m, n):
            # At full rank nothing is truncated, and the weighted sum is zero.
            return centre
        if sum(share != 0 for share in shares) == 2:
            warnings.warn(
                "with two models CART is plain averaging: their centred task vectors are opposite "
                "and cancel at any rank; use three or more (of weight above 0), or "
                "center: base",
                CartWarning,
                stacklevel=4,
            )

    def parts() -> Iterator[tuple[LowRank, float]]:
        for tensor, share, model in zip(tensors, shares, models, strict=True):
            if share == 0:
                continue
            delta = tensor - centre
            if settings.center == "base":
                check_finite(delta, [model], [tensor], where)
            factors = truncated(delta, settings, name)
            del delta  # before the next one is made
            yield factors, len(tensors) * share

    if settings.lambda_ == "auto":
        if min(shares) < 0:
            raise CartError(
                f"{where}: cart_auto (lambda: auto) takes no negative weights; merge with cart"
            )
        found = least_interference(parts()).to(centre.device).view(centre.shape)
        return centre.clone(memory_format=torch.contiguous_format).add_(found)
    merged = centre.clone(memory_format=torch.contiguous_format)
    sums = merged.view(shape)
    for factors, weight in parts():
        factors.add_to_(sums, settings.lambda_ * weight)
    return merged


def matrix_shape(name: str | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape ``(stack, m, n)`` of the matrices that a tensor of two or more dimensions holds.

    Convolution kernels ``(out, in, ...)`` are one matrix ``(out, in * ...)``; what else has three
    dimensions is a stack, such as the experts of a mixture.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3 and not (name is not None and _CONVOLUTION_NAME.search(name)):
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def centre_of(
    tensors: Sequence[Tensor],
    shares: Sequence[float],
    base: Tensor | None,
    models: Sequence[str],
    where: str,
) -> Tensor:
    """The base model's tensor if there is one, else the weighted mean; checked to be finite.

    In fp32 or better: fp16 values may overflow in a sum in fp16.
    """
    work = torch.promote_types(common_dtype(tensors), torch.float32)
    if base is not None:
        check_kind([("the base model", base)], tensors[0].shape, models[0], where)
        check_finite(base, ["the base model"], [base], where)
        return base.to(work, copy=True)
    mean = torch.zeros(tensors[0].shape, dtype=work, device=tensors[0].device)
    for tensor, share in zip(tensors, shares, strict=True):
        mean.add_(tensor, alpha=share)
    check_finite(mean, models, tensors, where)
    return mean


def truncated(delta: Tensor, settings: CartSettings, name: str | None) -> LowRank:
    """The low-rank part of a task vector, as factors of its matrices (`matrix_shape`)."""
    matrices = delta.reshape(matrix_shape(name, delta.shape))
    return factors_of(matrices, settings.rule, name, svd=settings.solver, seed=settings.seed)


def factors_of(
    matrices: Tensor, rule: RankRule, name: str | None, *, svd: str, seed: int
) -> LowRank:
    """What is kept of one model's difference from the centre.

    Args:
        matrices: the difference as ``(stack, m, n)``.
        rule: how much to keep.
        name: the tensor's, which the solver's start depends on.
        svd: solver, one of `cart_plugin.lowrank.SOLVERS`.
        seed: of the solver, for all tensors.

    Raises:
        CartError: as `truncated_svd`.
    """
    return truncated_svd(matrices, rule, svd=svd, seed=tensor_seed(seed, name or ""))


def tensor_seed(seed: int, name: str) -> int:
    """The solver's start: the same in every process and order of work, another for each tensor."""
    return (seed + zlib.crc32(name.encode())) % 2**63
