r"""AdaMerging for image classification pools (DINOv2, ConvNeXt, ResNet, ViT): with CART, and plain.

Each task keeps its fine-tuned head; the bodies are merged, and the coefficients adapted to low
entropy of the predictions on unlabelled test images::

    TASKS=[sun397,stanford-cars,resisc45,eurosat,svhn,gtsrb,mnist,dtd]
    fusion_bench method=cart/adamerging_image method.scaling_factor=1.5 \
        modelpool=ConvNextForImageClassification/convnext-base-224_8-tasks \
        +dataset/image_classification/test@modelpool.test_datasets=$TASKS \
        taskpool=ImageClassificationTaskPool/convnext-base-224_8-tasks

Plain AdaMerging of the same models: ``method=cart/plain_adamerging_image``, which needs the pool's
pretrained model. One coefficient a task: ``method.granularity=task``. For pools of encoders, whose
classifier is an identity, name models that have the heads. `make bench-vision` leaves such a pool
in ``~/.cache/cart-plugin/suite``::

    SUITE=~/.cache/cart-plugin/suite
    fusion_bench --config-name fabric_model_fusion hydra.searchpath=[file://$SUITE/conf] \
        +experiment=vision method=cart/adamerging_image 'method.heads=${taskpool.heads}' \
        'method.processor={_target_: torch.nn.Identity}' method.max_steps=20
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cart_plugin.fusion_bench.adamerging import CartAdaMerging
from cart_plugin.fusion_bench.adaptation import PRETRAINED
from cart_plugin.fusion_bench.images import ImageInputs
from cart_plugin.fusion_bench.parts import Parts, full_parts


class CartImageAdaMergingAlgorithm(ImageInputs, CartAdaMerging):
    """CART + AdaMerging for image classification pools; needs no pretrained model.

    Args:
        **kwargs: parameters of `ImageInputs` and of `CartAdaMerging`.
    """

    _config_mapping = CartAdaMerging._config_mapping | ImageInputs._config_mapping


class ImageClassificationAdaMergingAlgorithm(ImageInputs):
    """Plain AdaMerging (arXiv 2310.02575): the pretrained model and whole task vectors.

    Buffers, such as the statistics of batch norms, stay the pretrained model's.

    Args:
        init_values: where the coefficients start.
        seed: of the order of the batches.
        **kwargs: parameters of `ImageInputs`.
    """

    _config_mapping = ImageInputs._config_mapping | {
        "init_values": "init_values",
        "seed": "seed",
    }

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
