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

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from fusion_bench.dataset import ImageClassificationDataset
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.wrappers.switch import SwitchModule, set_active_option
from fusion_bench.utils import instantiate
from fusion_bench.utils.data import InfiniteDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.adamerging import AdaMerging
from cart_plugin.fusion_bench.base import CartBase, copied
from cart_plugin.fusion_bench.vectors import (
    LayerWise,
    Parts,
    TaskWise,
    cart_parts,
    full_parts,
    wrapped,
)

# What transformers and torchvision call the last layer.
HEAD_NAMES = ("classifier", "fc")


class ImageAdaMerging(AdaMerging):
    """What both methods share: heads, images, and the loop.

    The merged model has a `SwitchModule` of the heads in its classifier's place; FusionBench's
    task pools for images choose by the task's name, as does its ``set_active_option``.

    Args:
        heads: folders or names of models whose heads to use, by task; the others have their own.
        processor: image processor: a model's folder or name, a config with ``_target_``, or a
            callable. The pool's own if None.
        **kwargs: parameters of `AdaMerging`.
    """

    _config_mapping = AdaMerging._config_mapping | {"heads": "heads", "processor": "processor"}

    def __init__(
        self,
        heads: Mapping[str, str] | None = None,
        processor: str | Mapping[str, Any] | Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.processor = dict(heads or {}), processor

    @abstractmethod
    def parts(self, bodies: dict[str, nn.Module]) -> Parts:
        """Centre and task vectors of the models without their heads."""

    def check_pool(self, pool: BaseModelPool) -> None:
        """Also find the processor before any model is loaded.

        Raises:
            CartError: as `AdaMerging.check_pool`, or no processor.
        """
        super().check_pool(pool)
        self._images = _processor(self.processor, pool)

    def construct(self, pool: BaseModelPool) -> LayerWise | TaskWise:
        """Merge the bodies, and put all heads into one model."""
        unknown = sorted(set(self.heads) - set(pool.model_names))
        if unknown or not pool.model_names:
            raise CartError(
                f"heads are given for {', '.join(unknown) or 'nothing'}, but the pool has the "
                f"models {', '.join(pool.model_names) or 'none'}"
            )
        models = {name: pool.load_model(name) for name in pool.model_names}
        heads = {name: self._head(name, model) for name, model in models.items()}
        parts = self.parts({name: body(model) for name, model in models.items()})
        first = models[pool.model_names[0]]
        merged = copied(first) if pool.has_instance_models else first
        body(merged).load_state_dict(parts.centre)
        setattr(merged, head_name(merged), SwitchModule(heads))
        return wrapped(merged, parts.vectors, parts.start, self.granularity).eval()

    def adapt(self, module: LayerWise | TaskWise, pool: BaseModelPool) -> None:
        """Adam on the sum of the tasks' entropies, one batch of each a step.

        The model is in evaluation mode, so that what is adapted is what will be evaluated: in
        training mode batch norms would see one task's batch, and move their running statistics.
        """
        batches = {task: self._batches(task, pool) for task in pool.model_names}
        optimizer = torch.optim.Adam([module.merge_weight], lr=self.lr, betas=(0.9, 0.999))
        ready, optimizer = self.fabric.setup(module, optimizer)
        steps = 1 if self.is_debug_mode else self.max_steps
        bar = tqdm(range(steps), "AdaMerging", disable=not self.fabric.is_global_zero)
        for step in bar:
            module.merge_weights()
            metrics = {}
            for task, images in batches.items():
                set_active_option(module, task)
                outputs = ready(next(images))
                logits = outputs if isinstance(outputs, Tensor) else outputs.logits
                loss = entropy_loss(logits)
                # All tasks go back through one merge of the weights.
                self.fabric.backward(loss, retain_graph=True)
                metrics[f"train/{task}_entropy"] = loss.item()
            optimizer.step()
            optimizer.zero_grad()
            metrics["train/entropy"] = sum(metrics.values()) / len(metrics)
            self.fabric.log_dict(metrics, step=step)
            bar.set_postfix(entropy=metrics["train/entropy"])

    def _batches(self, task: str, pool: BaseModelPool) -> Iterator[Tensor]:
        loader = DataLoader(
            ImageClassificationDataset(pool.load_test_dataset(task), self._images),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for images, _ in InfiniteDataLoader(self.fabric.setup_dataloaders(loader)):
            yield images

    def _head(self, task: str, model: nn.Module) -> nn.Module:
        """A copy of a task's head, on its own so that the pool's model keeps what it has."""
        source = self.heads.get(task)
        if source is not None:
            from transformers import AutoModelForImageClassification

            try:
                model = AutoModelForImageClassification.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise CartError(f"the head of {task} does not load: {error}") from error
        head: nn.Module = getattr(model, head_name(model, task))
        if isinstance(head, nn.Identity):
            raise CartError(
                f"{source or task} has no classifier (an identity), so its predictions have no "
                f"entropy: give heads: {{{task}: folder of a model with its head}}"
            )
        return deepcopy(head)


class CartImageAdaMergingAlgorithm(ImageAdaMerging, CartBase):
    """CART + AdaMerging for image classification pools; needs no pretrained model.

    Args:
        **kwargs: parameters of `ImageAdaMerging` and of `CartBase`; the coefficients start at
            ``scaling_factor`` and are not clamped.
    """

    _config_mapping = CartBase._config_mapping | ImageAdaMerging._config_mapping

    def parts(self, bodies: dict[str, nn.Module]) -> Parts:
        """The average, and truncated centred task vectors."""
        return cart_parts(self.load(bodies), self.settings)


class ImageClassificationAdaMergingAlgorithm(ImageAdaMerging):
    """Plain AdaMerging (arXiv 2310.02575): the pretrained model and whole task vectors.

    Buffers, such as the statistics of batch norms, stay the pretrained model's.

    Args:
        init_values: where the coefficients start.
        seed: of the order of the batches.
        **kwargs: parameters of `ImageAdaMerging`.
    """

    _config_mapping = ImageAdaMerging._config_mapping | {
        "init_values": "init_values",
        "seed": "seed",
    }

    def __init__(self, init_values: float = 0.3, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_values, self.seed = init_values, seed

    def parts(self, bodies: dict[str, nn.Module]) -> Parts:
        """The pretrained model, and the differences from it."""
        if not self.modelpool.has_pretrained:
            raise CartError(
                "plain AdaMerging measures task vectors from the pretrained model: give the pool "
                "a _pretrained_, or use method=cart/adamerging_image, which needs none"
            )
        pretrained = body(self.modelpool.load_pretrained_model()).state_dict()
        return full_parts(bodies, pretrained, self.init_values)


def head_name(model: nn.Module, task: str = "the model") -> str:
    """The name of a model's head.

    Raises:
        CartError: none of `HEAD_NAMES`.
    """
    for name in HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise CartError(
        f"{task} is a {type(model).__name__} without a module {' or '.join(HEAD_NAMES)}; load it "
        "as an image classification model"
    )


def body(model: nn.Module) -> nn.Module:
    """A model without its head: a module that shares the model's tensors, under their names.

    FusionBench's pools bind a replaced ``forward`` to each model, so that a copy of one would run
    the original's weights; this one is made to be read and loaded, not to be run.
    """
    head, view = head_name(model), nn.Module()
    for name, parameter in model.named_parameters(recurse=False):
        view.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        view.register_buffer(name, buffer, name not in model._non_persistent_buffers_set)
    for name, child in model.named_children():
        if name != head:
            view.add_module(name, child)
    return view


def _processor(given: Any, pool: BaseModelPool) -> Any:
    if isinstance(given, Mapping):
        return instantiate(given)
    if callable(given):
        return given
    if given is None:
        config = pool.get_model_config("_pretrained_") if pool.has_pretrained else None
        # FusionBench's DINOv2 and ConvNeXt pools fail on a pretrained model that is a plain name,
        # as in its own convnext-base-224_8-tasks.
        given = config if isinstance(config, str) else None
    if given is not None:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(given)
    if not hasattr(pool, "load_processor"):
        raise CartError(
            f"a {type(pool).__name__} knows no image processor: give the method one, "
            "processor: folder or name of a model"
        )
    return pool.load_processor()
