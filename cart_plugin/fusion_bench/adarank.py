r"""CART + AdaRank (arXiv 2503.22178) for FusionBench: which singular directions each task adds.

A merged weight is ``centre + sum_t c_t sum_i b_ti s_ti u_ti v_ti^T``. The masks ``b_ti`` start as
CART's top k (or as ``cart_auto``'s, with ``method.scaling_factor=auto``) and are adapted, with the
coefficients ``c_t``, to low entropy of the predictions on unlabelled test batches. Eight CLIP
models::

    fusion_bench method=cart/adarank method.decompose=clip method.rank_ratio=0.16 \
        method.scaling_factor=2.3 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

GPT-2, Flan-T5 and image classification pools, as for AdaMerging::

    fusion_bench method=cart/adarank_gpt2 method.decompose=gpt2 method.rank_ratio=0.01 \
        method.scaling_factor=1.3 modelpool=cart/gpt-2_glue_tta taskpool=gpt-2_glue
    fusion_bench method=cart/adarank_flan_t5 \
        modelpool=Seq2SeqLMPool/flan-t5-base_glue_tta taskpool=flan-t5_glue_text_generation
    fusion_bench method=cart/adarank_image modelpool=... taskpool=...

The adapted masks and coefficients again, without adaptation:
``method.merging_weights_load_path=$PWD/masks.safetensors``, with the other settings as they were.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from rich.console import Console
from torch import nn

from cart_plugin.checkpoints.files import write_json
from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.adamerging import CartAdaMerging
from cart_plugin.fusion_bench.images import ImageInputs
from cart_plugin.fusion_bench.inputs import ClipInputs, FlanT5Inputs, GPT2Inputs
from cart_plugin.fusion_bench.merged import Merged
from cart_plugin.fusion_bench.parameters import check_rate
from cart_plugin.fusion_bench.parts import Parts, cart_parts
from cart_plugin.fusion_bench.ranks import mean_rank, ranks_of, report, summary

log = logging.getLogger(__name__)


class CartAdaRank(CartAdaMerging):
    """CART + AdaRank.

    Scores of all candidates are adapted, by Adam, together with the coefficients; a direction is in
    the merge where its score is above a half. They start at 1 for what the merge keeps and at 0 for
    the rest, so that half of ``1 / mask_lr`` steps of one mind turn a direction on or off.

    Args:
        mask_lr: Adam's learning rate for the scores.
        candidates: share of the singular directions that the masks choose from. All of them take
            up to twice the memory of the dense differences, half of them no more than these; a
            task's part of memory is ``candidates * min(m, n) * (m + n)`` numbers a matrix.
        center: ``base``: uncentred, around the pool's pretrained model; ``average``: it has no part
            with ``auto``, either. None as for ``method=cart`` and ``method=cart/auto``.
        ranks_save_path: where to report the ranks by layer and task, as JSON; a name without a
            folder goes to the log folder. Nowhere if None.
        **kwargs: parameters of `CartAdaMerging`.
    """

    title = "AdaRank"
    written = (*CartAdaMerging.written, "ranks_save_path")
    _config_mapping = CartAdaMerging._config_mapping | {
        name: name for name in ("mask_lr", "candidates", "center", "ranks_save_path")
    }

    def __init__(
        self,
        mask_lr: float = 1e-2,
        candidates: float = 0.5,
        center: Literal["average", "base"] | None = None,
        ranks_save_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.center = center
        super().__init__(**kwargs)
        check_rate("mask_lr", mask_lr)
        check_rate("candidates", candidates)
        if candidates > 1:
            raise CartError(f"candidates is a share of the directions, at most 1, got {candidates}")
        self.mask_lr, self.candidates = mask_lr, candidates
        self.ranks_save_path = ranks_save_path

    @property
    def needs_pretrained(self) -> bool:
        """Where task vectors are measured from it."""
        return self.center == "base"

    @property
    def identity(self) -> dict[str, Any]:
        """Also the scores' learning rate and number; the rest shows in the models' sizes."""
        return super().identity | {"mask_lr": self.mask_lr, "candidates": self.candidates}

    def parts(self, models: dict[str, nn.Module]) -> Parts:
        """The centre, and candidates of each task vector with masks."""
        return cart_parts(self.load(models), self.settings, self.candidates)

    def decomposes_nothing(self, reason: str) -> None:
        """Refuse it.

        Raises:
            CartError: always.
        """
        raise CartError(f"{reason}: there are no ranks to adapt")

    def groups(self, module: Merged) -> list[dict[str, Any]]:
        """Coefficients and scores."""
        scores = [term.scores for term in module.masked.values()]
        return [*super().groups(module), {"params": scores, "lr": self.mask_lr}]

    def progress(self, module: Merged) -> dict[str, float]:
        """The mean rank of a task's matrix."""
        return {"rank": mean_rank(module)}

    def finish(self, module: Merged) -> None:
        """Also report the ranks."""
        super().finish(module)
        layers, tasks = ranks_of(module), list(self.modelpool.model_names)
        # Not through the log, which breaks lines.
        Console().print(summary(layers, tasks), soft_wrap=True, highlight=False, markup=False)
        if self.ranks_save_path is not None:
            path = self.place(self.ranks_save_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, report(layers, tasks))
            log.info("ranks: %s", path)


class CartCLIPAdaRankAlgorithm(ClipInputs, CartAdaRank):
    """CART + AdaRank for CLIP pools."""

    _config_mapping = CartAdaRank._config_mapping


class CartGPT2AdaRankAlgorithm(GPT2Inputs, CartAdaRank):
    """CART + AdaRank for GPT-2 pools."""

    _config_mapping = CartAdaRank._config_mapping


class CartFlanT5AdaRankAlgorithm(FlanT5Inputs, CartAdaRank):
    """CART + AdaRank for Flan-T5 pools."""

    _config_mapping = CartAdaRank._config_mapping


class CartImageAdaRankAlgorithm(ImageInputs, CartAdaRank):
    """CART + AdaRank for image classification pools.

    Args:
        **kwargs: parameters of `ImageInputs` and of `CartAdaRank`.
    """

    _config_mapping = CartAdaRank._config_mapping | ImageInputs._config_mapping
