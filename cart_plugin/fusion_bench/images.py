"""Inputs and heads of image classification pools: DINOv2, ConvNeXt, ResNet, ViT.

Each task keeps its fine-tuned head; the bodies are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from fusion_bench.dataset import ImageClassificationDataset
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.wrappers.switch import SwitchModule, set_active_option
from fusion_bench.utils import instantiate
from fusion_bench.utils.data import InfiniteDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.adaptation import PRETRAINED, Adaptation
from cart_plugin.fusion_bench.base import as_pool, refuse_saving
from cart_plugin.fusion_bench.parameters import check_tasks
from cart_plugin.fusion_bench.parts import Parts
from cart_plugin.fusion_bench.unlabelled import Unlabelled, check_not_empty

# What transformers and torchvision call the last layer.
HEAD_NAMES = ("classifier", "fc")


class ImageInputs(Adaptation):
    """Images of a pool, and a head a task.

    The merged model has a `SwitchModule` of the heads in its classifier's place; FusionBench's
    task pools for images choose by the task's name, as does its ``set_active_option``.

    Args:
        heads: folders or names of models whose heads to use, by task; the others have their own.
        processor: image processor: a model's folder or name, a config with ``_target_``, or a
            callable. The pool's own if None.
        **kwargs: parameters of `Adaptation`.
    """

    _config_mapping = Adaptation._config_mapping | {"heads": "heads", "processor": "processor"}

    def __init__(
        self,
        heads: Mapping[str, str] | None = None,
        processor: str | Mapping[str, Any] | Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.processor = dict(heads or {}), processor

    @property
    def identity(self) -> dict[str, Any]:
        """Also whose heads are taken."""
        return super().identity | {"heads": {task: str(one) for task, one in self.heads.items()}}

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """Merge the bodies of a pool's models; see `Adaptation.run`.

        Raises:
            CartError: as there, the program is told to save the merged model, or tasks have names
                that FusionBench cannot tell apart.
        """
        refuse_saving(
            self,
            "the merged model has a head for each task, which no model class of transformers can "
            "load; what was adapted is saved in merging_weights_save_path and merges again",
        )
        pool = as_pool(modelpool)
        check_tasks(pool.model_names)
        return super().run(pool)

    def check_pool(self, pool: BaseModelPool) -> None:
        """Also find the processor before any model is loaded.

        Raises:
            CartError: as `Adaptation.check_pool`, or no processor.
        """
        super().check_pool(pool)
        self._images = _processor(self.processor, pool)

    def bodies(self, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The models without their heads."""
        tasks = [name for name in models if name != PRETRAINED]
        unknown = sorted(set(self.heads) - set(tasks))
        if unknown or not tasks:
            raise CartError(
                f"heads are given for {', '.join(unknown) or 'nothing'}, but the pool has the "
                f"models {', '.join(tasks) or 'none'}"
            )
        return {name: body(model) for name, model in models.items()}

    def host(self, first: nn.Module, models: dict[str, nn.Module], parts: Parts) -> nn.Module:
        """The first model with the centre and all heads in it."""
        heads = {
            name: self._head(name, model) for name, model in models.items() if name != PRETRAINED
        }
        body(first).load_state_dict(parts.centre)
        setattr(first, head_name(first), SwitchModule(heads))
        return first

    def prepare_inputs(self, pool: BaseModelPool) -> None:
        """Load the test data.

        Raises:
            CartError: there is none.
        """
        self._data = {task: Unlabelled(pool.load_test_dataset(task)) for task in pool.model_names}
        check_not_empty(self._data)

    def batches(self, task: str) -> Iterator[Tensor]:
        """Images, as the processor makes them."""
        loader = DataLoader(
            ImageClassificationDataset(self._data[task], self._images),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for images, _ in InfiniteDataLoader(self.fabric.setup_dataloaders(loader)):
            yield images

    def logits(self, model: nn.Module, batch: Any, task: str) -> Tensor:
        """The task's head on the merged body."""
        set_active_option(model, task)
        outputs = model(batch)
        found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        return found

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

        try:
            return AutoImageProcessor.from_pretrained(given)
        except (OSError, ValueError) as error:
            raise CartError(f"the image processor does not load: {error}") from error
    if not hasattr(pool, "load_processor"):
        raise CartError(
            f"a {type(pool).__name__} knows no image processor: give the method one, "
            "processor: folder or name of a model"
        )
    return pool.load_processor()
