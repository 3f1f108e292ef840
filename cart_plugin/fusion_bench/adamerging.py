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
        method.merging_weights_load_path=$PWD/merging_weights.safetensors \
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

import warnings
from typing import Any

from torch import nn

from cart_plugin.errors import CartWarning
from cart_plugin.fusion_bench.adaptation import PRETRAINED, Adaptation
from cart_plugin.fusion_bench.base import CartBase
from cart_plugin.fusion_bench.inputs import ClipInputs, FlanT5Inputs, GPT2Inputs
from cart_plugin.fusion_bench.parts import Parts, cart_parts, full_parts


class CartAdaMerging(Adaptation, CartBase):
    """CART + AdaMerging.

    Args:
        **kwargs: parameters of `Adaptation` and of `CartBase`; the coefficients start at
            ``scaling_factor`` and are not clamped. With ``auto`` the merge starts as that of
            ``method=cart/auto``, and each task's part of it has a coefficient that starts at 1.
    """

    takes_auto = True
    _config_mapping = CartBase._config_mapping | Adaptation._config_mapping

    def parts(self, models: dict[str, nn.Module]) -> Parts:
        """The average, and truncated centred task vectors."""
        return cart_parts(self.load(models), self.settings)

    def decomposes_nothing(self, reason: str) -> None:
        """Say so: the coefficients adapt whole differences from the average."""
        warnings.warn(f"{reason}: whole task vectors are adapted", CartWarning, stacklevel=3)

    @property
    def takes_pretrained(self) -> bool:
        """Where ``auto`` does."""
        return self.settings.takes_base

    @property
    def identity(self) -> dict[str, Any]:
        """Also what the merge starts from, but for what shows in the models' sizes."""
        names = ("scaling_factor", "rank_ratio", "rank", "energy")
        return super().identity | {name: getattr(self, name) for name in names}


class PlainAdaMerging(Adaptation):
    """Plain AdaMerging (arXiv 2310.02575): the pretrained model and whole task vectors.

    Buffers, such as the statistics of batch norms, stay the pretrained model's.

    Args:
        init_values: where the coefficients start.
        seed: of the order of the batches.
        **kwargs: parameters of `Adaptation`.
    """

    _config_mapping = Adaptation._config_mapping | {"init_values": "init_values", "seed": "seed"}

    def __init__(self, init_values: float = 0.3, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_values, self.seed = init_values, seed

    @property
    def needs_pretrained(self) -> bool:
        """Task vectors are measured from it."""
        return True

    @property
    def identity(self) -> dict[str, Any]:
        """Also where the coefficients start."""
        return super().identity | {"init_values": self.init_values}

    def parts(self, models: dict[str, nn.Module]) -> Parts:
        """The pretrained model, and the differences from it."""
        tasks = {name: model for name, model in models.items() if name != PRETRAINED}
        return full_parts(tasks, models[PRETRAINED].state_dict(), self.init_values)


class CartCLIPAdaMergingAlgorithm(ClipInputs, CartAdaMerging):
    """CART + AdaMerging for CLIP pools."""

    _config_mapping = CartAdaMerging._config_mapping


class CartGPT2AdaMergingAlgorithm(GPT2Inputs, CartAdaMerging):
    """CART + AdaMerging for GPT-2 pools."""

    _config_mapping = CartAdaMerging._config_mapping


class CartFlanT5AdaMergingAlgorithm(FlanT5Inputs, CartAdaMerging):
    """CART + AdaMerging for Flan-T5 pools."""

    _config_mapping = CartAdaMerging._config_mapping
