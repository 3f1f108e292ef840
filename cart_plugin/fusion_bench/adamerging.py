r"""CART + AdaMerging for FusionBench's CLIP, GPT-2 and Flan-T5 pools.

The coefficients of the truncated centred task vectors start at ``scaling_factor`` and are adapted
to low entropy of the predictions on unlabelled test batches. Eight CLIP models::

    fusion_bench method=cart/adamerging method.decompose=clip method.rank_ratio=0.12 \
        method.scaling_factor=2.0 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

One coefficient a task rather than one a task and parameter: ``method.granularity=task``. The
adapted coefficients again, without adaptation::

    fusion_bench method=cart/adamerging method.decompose=clip method.rank_ratio=0.12 \
        method.merging_weights_load_path=$PWD/merging_weights.pt \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=cart/clip-vit-classification_TA8

From ``cart_auto``'s merge, with nothing to choose: ``method.scaling_factor=auto``. GPT-2 and
Flan-T5 on GLUE::

    fusion_bench method=cart/adamerging_gpt2 method.decompose=gpt2 method.rank_ratio=0.01 \
        method.scaling_factor=1.3 modelpool=cart/gpt-2_glue_tta taskpool=gpt-2_glue
    fusion_bench method=cart/adamerging_flan_t5 \
        modelpool=Seq2SeqLMPool/flan-t5-base_glue_tta taskpool=flan-t5_glue_text_generation

Image classification pools: `cart_plugin.fusion_bench.image_adamerging`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cart_plugin.fusion_bench.adaptation import Adaptation
from cart_plugin.fusion_bench.base import CartBase
from cart_plugin.fusion_bench.inputs import ClipInputs, FlanT5Inputs, GPT2Inputs
from cart_plugin.fusion_bench.parts import Parts, cart_parts


class CartAdaMerging(Adaptation, CartBase):
    """CART + AdaMerging.

    Args:
        **kwargs: parameters of `Adaptation` and of `CartBase`; the coefficients start at
            ``scaling_factor`` and are not clamped. With ``auto`` the merge starts as that of
            ``method=cart/auto`` without a pretrained model, and each task's part of it has a
            coefficient that starts at 1.
    """

    takes_auto = True
    center = "average"
    _config_mapping = CartBase._config_mapping | Adaptation._config_mapping

    def parts(self, models: dict[str, nn.Module]) -> Parts:
        """The average, and truncated centred task vectors."""
        return cart_parts(self.load(models), self.settings)

    @property
    def identity(self) -> dict[str, Any]:
        """Also what the merge starts from, but for what shows in the models' sizes."""
        names = ("scaling_factor", "rank_ratio", "rank", "energy")
        return super().identity | {name: getattr(self, name) for name in names}


class CartCLIPAdaMergingAlgorithm(ClipInputs, CartAdaMerging):
    """CART + AdaMerging for CLIP pools."""

    _config_mapping = CartAdaMerging._config_mapping


class CartGPT2AdaMergingAlgorithm(GPT2Inputs, CartAdaMerging):
    """CART + AdaMerging for GPT-2 pools."""

    _config_mapping = CartAdaMerging._config_mapping


class CartFlanT5AdaMergingAlgorithm(FlanT5Inputs, CartAdaMerging):
    """CART + AdaMerging for Flan-T5 pools."""

    _config_mapping = CartAdaMerging._config_mapping
