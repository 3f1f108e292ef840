r"""Task pools: FusionBench's CLIP pool, LM evaluation, and image classification with heads.

FusionBench's CLIP task pools on transformers 5: those of the paper's suites as
``taskpool=cart/clip-vit-classification_TA8`` and so on, any other by its class::

    fusion_bench method=cart modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TALL10 \
        taskpool=CLIPVisionModelTaskPool/clip-vit-base-patch32_svhn_and_mnist \
        taskpool._target_=cart_plugin.fusion_bench.taskpool.CLIPVisionModelTaskPool

Its LM-Eval Harness pool on lm-eval 0.4.9 and newer (a config for FusionBench's own runs here in
the same way, with ``taskpool._target_``)::

    fusion_bench method=cart modelpool=CausalLMPool/... taskpool=cart/lm_eval \
        "taskpool.tasks=[gsm8k]" +taskpool.limit=100

Encoders without a classifier, with a head a task (see `ImageClassificationTaskPool`)::

    fusion_bench method=cart modelpool=... taskpool=cart/image_classification \
        taskpool.processor=encoders/mnist +taskpool.heads.mnist=heads/mnist \
        +taskpool.test_datasets.mnist._target_=datasets.load_from_disk \
        +taskpool.test_datasets.mnist.dataset_path=data/mnist
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.compat import clip_vision_transformer, prepare

prepare()
clip_vision_transformer()

# ruff: noqa: E402 - what follows needs the two calls above
import torch
from fusion_bench import BaseTaskPool, LightningFabricMixin, auto_register_config
from fusion_bench.models.wrappers.switch import SwitchModule
from fusion_bench.taskpool.clip_vision.taskpool import CLIPVisionModelTaskPool as _ClipPool
from fusion_bench.taskpool.image_classification import ImageClassificationTaskPool as _ImagePool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory, get_num_classes
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor, nn

from cart_plugin.fusion_bench.parameters import check_tasks

# Tasks that FusionBench has from here: the next job of a multi-run may bring other heads.
_registered: set[str] = set()
# What of lm-eval's results goes into FusionBench's report; its own file holds the rest.
_REPORTED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class CLIPVisionModelTaskPool(_ClipPool):
    """FusionBench's zero-shot image classification, importable on transformers 5."""


class TaskHead(nn.Linear):
    """A frozen linear classifier, in fp32 whatever the encoder computes in.

    Args:
        task: its name, for errors.
        weight: ``(classes, features)``.
        bias: ``(classes,)`` or None.
    """

    def __init__(self, task: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.task = task
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of features ``(N, features)``."""
        if features.shape[-1] != self.in_features:
            raise CartError(
                f"the head of task {self.task!r} takes {self.in_features} features, "
                f"the model gives {features.shape[-1]}"
            )
        return super().forward(features.to(self.weight.dtype))


@auto_register_config
class ImageClassificationTaskPool(_ImagePool):
    """FusionBench's image classification, for encoders whose heads are kept outside the merge.

    Every module's ``classifier`` (the identity in ``Dinov2ForImageClassification`` with
    ``num_labels: 0``) gives way to the heads while the model is evaluated, and FusionBench's
    switch picks the task's own. Tasks that FusionBench does not know get as many classes as their
    head has, under the classes' numbers.

    Args:
        test_datasets: as FusionBench's, by task.
        heads: a folder by task, whose ``*.safetensors`` hold ``classifier.weight`` ``(classes,
            features)`` and mostly ``classifier.bias``: a fine-tuned classifier, or its head alone.
        **kwargs: FusionBench's ``processor`` and ``dataloader_kwargs``.

    Raises:
        CartError: no test dataset; tasks with names that FusionBench cannot tell apart; a task
            without a head; a head that is missing, is not linear, or fits neither the others nor
            the task's classes.
    """

    def __init__(self, test_datasets: Any, *, heads: Mapping[str, str], **kwargs: Any) -> None:
        check_tasks(test_datasets)
        super().__init__(test_datasets, **kwargs)
        self._heads = _load_heads(heads, list(test_datasets))
        self._register_tasks()

    def setup(self) -> None:
        """Load the test datasets, once: FusionBench's own does it for every model."""
        super().setup()
        self._is_setup = True

    def load_test_dataset(self, dataset_name: str, *args: Any, **kwargs: Any) -> Any:
        """As FusionBench's; its errors say which dataset it was.

        Raises:
            CartError: it cannot be loaded.
        """
        try:
            return super().load_test_dataset(dataset_name, *args, **kwargs)
        except Exception as error:
            raise CartError(f"test dataset {dataset_name!r} cannot be loaded: {error}") from error

    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Accuracy and loss by task, and their averages.

        Raises:
            CartError: the model has no ``classifier``, or gives features that the heads do not
                take.
        """
        self._register_tasks()  # another pool may have heads of other sizes for them
        with _own_forward(model), _heads_in_place(model, SwitchModule(self._heads)):
            return super().evaluate(model, name=name, **kwargs)

    def _register_tasks(self) -> None:
        for task, head in self._heads.items():
            _register(task, head.out_features)

    def _evaluate(self, classifier: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
        # FusionBench 0.2.33 chooses the task of switches only; EMR's models have `set_task`.
        set_task: Any = getattr(classifier, "set_task", None)
        if set_task is not None:
            set_task(kwargs["task_name"])
        result: dict[str, float] = super()._evaluate(classifier, *args, **kwargs)
        return result


def _load_heads(folders: Mapping[str, str], tasks: Iterable[str]) -> dict[str, TaskHead]:
    heads = {}
    for task in tasks:
        if task not in folders:
            raise CartError(
                f"taskpool.heads has no head for task {task!r}; "
                f"it has {', '.join(folders) or 'none at all'}"
            )
        heads[task] = _load_head(task, Path(folders[task]))
    if not heads:
        raise CartError("taskpool.test_datasets is empty: there is nothing to evaluate on")
    widths = {head.in_features for head in heads.values()}
    if len(widths) > 1:
        found = ", ".join(f"{task}: {head.in_features}" for task, head in heads.items())
        raise CartError(f"the heads take features of different widths: {found}")
    return heads


def _load_head(task: str, folder: Path) -> TaskHead:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CartError(f"the head of task {task!r}: no .safetensors file in {folder}")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = {"classifier.weight", "classifier.bias"} & set(opened.keys())
            found |= {name: opened.get_tensor(name) for name in names}
    weight, bias = found.get("classifier.weight"), found.get("classifier.bias")
    if weight is None:
        raise CartError(f"the head of task {task!r}: no classifier.weight in {folder}")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items())
        raise CartError(f"the head of task {task!r} in {folder} is not linear: {shapes}")
    return TaskHead(task, weight, bias)


def _register(task: str, classes: int) -> None:
    """Tell FusionBench how many classes a task has."""
    known = task in CLIPTemplateFactory.get_available_datasets()
    if known and get_num_classes(task) == classes:
        return
    if known and task not in _registered:
        raise CartError(
            f"the head of task {task!r} has {classes} classes, FusionBench's task of that name "
            f"has {get_num_classes(task)}"
        )
    _registered.add(task)
    # Given all three, 0.2.33 stores the first; given the last two it loses the templates.
    names = [str(number) for number in range(classes)]
    info = {"classnames": names, "templates": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is there already
        CLIPTemplateFactory.register_dataset(
            task, dataset_info=info, classnames=names, templates=[]
        )


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Let every module run its own weights.

    The models of FusionBench 0.2.33's DINOv2 and ConvNeXt pools have a function in the place of
    ``forward`` that is bound to the model it was made for: a copy, which most methods return, would
    run the original's weights.
    """
    names = ("forward", "original_forward")
    owners = [module for module in model.modules() if "original_forward" in vars(module)]
    kept = [{name: vars(owner).pop(name) for name in names} for owner in owners]
    try:
        yield
    finally:
        for owner, functions in zip(owners, kept, strict=True):
            vars(owner).update(functions)


@contextmanager
def _heads_in_place(model: nn.Module, heads: nn.Module) -> Iterator[None]:
    # Several owners where the model is itself a switch (CART-Indexing).
    owners = [module for module in model.modules() if "classifier" in module._modules]
    if not owners:
        raise CartError(f"{type(model).__name__} has no `classifier` that heads could replace")
    before = [owner.classifier for owner in owners]
    for owner in owners:
        owner.classifier = heads
    try:
        yield
    finally:
        for owner, module in zip(owners, before, strict=True):
            owner.classifier = module


@auto_register_config
class LMEvalHarnessTaskPool(LightningFabricMixin, BaseTaskPool):
    """The LM Evaluation Harness through its public entry, `lm_eval.simple_evaluate`.

    The tokenizer is the model pool's, or the one beside the model's weights.

    Args:
        tasks: names of tasks, groups or tags.
        apply_chat_template: True, or the name of a template.
        include_path: folder with further task definitions.
        batch_size: a number, ``auto`` or ``auto:N``.
        metadata: handed to the tasks that ask for it.
        verbosity: lm-eval's log level.
        output_path: folder for lm-eval's files; ``lm_eval_results`` in the log folder if None.
        log_samples: write the samples there, too.
        _usage_: FusionBench's own.
        _version_: FusionBench's own.
        **kwargs: further parameters of `lm_eval.simple_evaluate`, such as ``limit``.
    """

    def __init__(
        self,
        tasks: str | Iterable[str],
        apply_chat_template: bool | str = False,
        include_path: str | None = None,
        batch_size: int | str = 1,
        metadata: Mapping[str, Any] | None = None,
        verbosity: str | None = None,
        output_path: str | None = None,
        log_samples: bool = False,
        _usage_: str | None = None,
        _version_: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_usage_=_usage_, _version_=_version_)
        self.tasks, self.include_path, self.metadata = tasks, include_path, metadata
        self.apply_chat_template, self.batch_size = apply_chat_template, batch_size
        self.verbosity, self.output_path, self.log_samples = verbosity, output_path, log_samples
        self._options = {key: _plain(value) for key, value in kwargs.items()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        """Evaluate a transformers model on the tasks.

        Args:
            model: a `PreTrainedModel`.
            **kwargs: parameters of `lm_eval.simple_evaluate`, before those of the config.

        Returns:
            lm-eval's results by task, with versions and numbers of samples; empty on all but the
            first process.

        Raises:
            CartError: lm-eval is not installed.
        """
        try:
            from lm_eval import simple_evaluate
            from lm_eval.loggers import EvaluationTracker
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
            from lm_eval.utils import handle_non_serializable
        except ImportError as error:
            raise CartError(f"{error}: pip install 'cart-plugin[lm-eval]'") from error

        metadata = _plain(self.metadata)
        harnessed = HFLM(
            pretrained=self.fabric.to_device(model),
            tokenizer=self._tokenizer(),
            batch_size=self.batch_size,
        )
        tracker = EvaluationTracker(output_path=self._output_path())
        results = simple_evaluate(
            harnessed,
            tasks=[self.tasks] if isinstance(self.tasks, str) else list(self.tasks),
            batch_size=self.batch_size,
            apply_chat_template=self.apply_chat_template,
            task_manager=TaskManager(include_path=self.include_path, metadata=metadata),
            metadata=metadata,
            log_samples=self.log_samples,
            evaluation_tracker=tracker,
            **{"verbosity": self.verbosity, **self._options, **kwargs},
        )
        if results is None:
            return {}
        samples = results.pop("samples", None)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, of_task in (samples or {}).items():
            tracker.save_results_samples(task_name=task, samples=of_task)
        reported = {key: results[key] for key in _REPORTED if results.get(key)}
        plain: dict[str, Any] = json.loads(json.dumps(reported, default=handle_non_serializable))
        return plain

    def _tokenizer(self) -> Any:
        pool: Any = getattr(self._program, "modelpool", None)
        # A pool configured without a tokenizer has the method all the same; it fails then.
        told = pool is not None and pool.config.get("tokenizer") is not None
        return pool.load_tokenizer() if told else None

    def _output_path(self) -> str | None:
        if self.output_path is not None or self.log_dir is None:
            return self.output_path
        return str(Path(self.log_dir) / "lm_eval_results")


def _plain(value: Any) -> Any:
    """A config's part as dicts and lists."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
