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

from cart_plugin.fusion_bench.adamerging import CartAdaMerging, PlainAdaMerging
from cart_plugin.fusion_bench.images import ImageInputs


class CartImageAdaMergingAlgorithm(ImageInputs, CartAdaMerging):
    """CART + AdaMerging for image classification pools; needs no pretrained model.

    Args:
        **kwargs: parameters of `ImageInputs` and of `CartAdaMerging`.
    """

    _config_mapping = CartAdaMerging._config_mapping | ImageInputs._config_mapping


class ImageClassificationAdaMergingAlgorithm(ImageInputs, PlainAdaMerging):
    """Plain AdaMerging for image classification pools.

    Args:
        **kwargs: parameters of `ImageInputs` and of `PlainAdaMerging`.
    """

    _config_mapping = PlainAdaMerging._config_mapping | ImageInputs._config_mapping
