"""What all merges here that adapt at test time share: build, adapt or reload, merge.

A method says of what the merged model consists (`Adaptation.parts`), and where inputs and heads
come from (`Adaptation.batches`, `Adaptation.logits`); the latter is a class for each kind of pool,
in `cart_plugin.fusion_bench.inputs` and `cart_plugin.fusion_bench.images`.
"""

from __future__ import annotations

import itertools
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, LightningFabricMixin
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.mixins import SimpleProfilerMixin
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.utils import load_state_dict_into_target_modules
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from cart_plugin.errors import CartError, first_line
from cart_plugin.fusion_bench import compat
from cart_plugin.fusion_bench.adapted import load_adapted, load_state, save_adapted, save_state
from cart_plugin.fusion_bench.base import as_pool
from cart_plugin.fusion_bench.fleet import copied
from cart_plugin.fusion_bench.merged import GRANULARITIES, Merged
from cart_plugin.fusion_bench.parameters import check_path, check_rate, check_whole, check_writable
from cart_plugin.fusion_bench.parts import Parts

compat.prepare()
log = logging.getLogger(__name__)

# Of `fabric.precision`: others turn the merge's own tensors into numbers of theirs.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_NARROW = (torch.bfloat16, torch.float16)
PRETRAINED = "_pretrained_"


class Adaptation(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """A merge whose coefficients are adapted to low entropy of the predictions.

    Args:
        granularity: ``layer`` for a coefficient per task and parameter, ``task`` for one per task.
        max_steps: steps of Adam, each over one batch of every task; 0 for none.
        lr: Adam's learning rate.
        batch_size: inputs in a batch.
        num_workers: processes that load a task's batches.
        merging_weights_load_path: what a run with the same models and settings has saved, to merge
            with, without adaptation.
        merging_weights_save_path: where to save what was adapted; a name without a folder goes to
            the log folder.
        checkpoint_path: a file that keeps the state of the run; a run that finds it goes on from
            there, to the same result.
        checkpoint_every: steps between two states.
        **kwargs: parameters of the method that is adapted.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {
        name: name
        for name in (
            *("granularity", "max_steps", "lr", "batch_size", "num_workers"),
            *("merging_weights_load_path", "merging_weights_save_path"),
            *("checkpoint_path", "checkpoint_every"),
        )
    }
    modelpool: BaseModelPool
    seed: int  # also of the order of the batches
    title = "AdaMerging"  # what the progress bar says
    # Parameters that are files to be written.
    written: tuple[str, ...] = ("merging_weights_save_path", "checkpoint_path")

    def __init__(
        self,
        granularity: str = "layer",
        max_steps: int = 1000,
        lr: float = 1e-3,
        batch_size: int = 16,
        num_workers: int = 0,
        merging_weights_load_path: str | None = None,
        merging_weights_save_path: str | None = None,
        checkpoint_path: str | None = None,
        checkpoint_every: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if granularity not in GRANULARITIES:
            raise CartError(f"granularity must be layer or task, got {granularity!r}")
        check_whole("max_steps", max_steps, 0)
        check_whole("batch_size", batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        check_whole("checkpoint_every", checkpoint_every, 1)
        check_rate("lr", lr)
        self.granularity, self.max_steps, self.lr = granularity, max_steps, lr
        self.batch_size, self.num_workers = batch_size, num_workers
        self.merging_weights_load_path = merging_weights_load_path
        self.merging_weights_save_path = merging_weights_save_path
        self.checkpoint_path, self.checkpoint_every = checkpoint_path, checkpoint_every

    @property
    def adapts(self) -> bool:
        """Whether this run adapts, rather than taking what is in a file or the first values."""
        return self.merging_weights_load_path is None and self.max_steps > 0

    @property
    def needs_pretrained(self) -> bool:
        """Whether the pool's pretrained model has a part in the merge."""
        return False

    @property
    def takes_pretrained(self) -> bool:
        """Whether it has one if the pool holds it."""
        return self.needs_pretrained

    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """Merge the models of a pool.

        Returns:
            The merged model, as it was adapted.

        Raises:
            CartError: no test data to adapt to, files that do not fit, predictions without an
                entropy, and as the method that is adapted.
        """
        pool = as_pool(modelpool)
        self.modelpool = pool
        saved = self.merging_weights_load_path and Path(self.merging_weights_load_path)
        if saved and not saved.is_file():
            raise CartError(f"merging_weights_load_path: there is no file {saved}")
        for name in self.written:
            given = getattr(self, name)
            check_path(name, given)
            if given is not None:
                check_writable(
                    name, Path(given) if name == "checkpoint_path" else self.place(given)
                )
        if self.needs_pretrained and not pool.has_pretrained:
            raise CartError(
                "task vectors around the pretrained model need one: give the pool a _pretrained_, "
                "or take CART's, around the average, which need none"
            )
        if self.adapts:
            self.check_pool(pool)
            self.prepare_inputs(pool)
        with self.profile("construct the merged model"), torch.no_grad():
            module = self.construct(pool)
        if saved:
            self.restore(saved, module)
        if self.adapts:
            with self.profile("test-time adaptation"), torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.adapt(module, pool)
        if self.fabric.is_global_zero:
            self.finish(module)
        self.print_profile_summary()
        return module.unload()

    def check_pool(self, pool: BaseModelPool) -> None:
        """Refuse what has nothing to adapt to, before its models are loaded.

        Raises:
            CartError: a model without test data, several processes, or a precision that the merge
                does not keep.
        """
        missing = [name for name in pool.model_names if name not in pool.test_dataset_names]
        if missing:
            raise CartError(
                f"adaptation needs test inputs (not their labels), but the pool has none for "
                f"{', '.join(missing)}: add them to its test_datasets, under the models' names"
            )
        if self.fabric.world_size > 1:
            raise CartError(
                f"adaptation runs in one process, got {self.fabric.world_size}: fabric.devices=1"
            )
        precision = self.fabric.strategy.precision.precision
        if precision not in _PRECISIONS:
            raise CartError(
                f"fabric.precision={precision} would turn coefficients and task vectors into "
                f"numbers of its own; take one of {', '.join(_PRECISIONS)}, which leave them"
            )

    def construct(self, pool: BaseModelPool) -> Merged:
        """The merged model before it is adapted."""
        names = [*pool.model_names]
        if self.takes_pretrained and pool.has_pretrained:
            names.append(PRETRAINED)
        models = {name: pool.load_model(name) for name in names}
        for name, model in models.items():
            if not isinstance(model, nn.Module):
                raise CartError(
                    f"{name} is a {type(model).__name__}: adaptation runs the models, give it a "
                    "pool that loads modules"
                )
        parts = self.parts(self.bodies(models))
        first = models[names[0]]
        host = self.host(copied(first) if pool.has_instance_models else first, models, parts)
        return Merged(host, parts.terms, parts.start, self.granularity).eval()

    def bodies(self, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """What of the models is merged."""
        return models

    @abstractmethod
    def parts(self, models: dict[str, nn.Module]) -> Parts:
        """Centre and task vectors of what is merged."""

    def host(
        self,
        first: nn.Module,
        models: dict[str, nn.Module],  # noqa: ARG002 - images take heads from them
        parts: Parts,
    ) -> nn.Module:
        """The model that becomes the merged one: the first, with the centre in it."""
        load_state_dict_into_target_modules(first, parts.centre)
        return first

    @abstractmethod
    def prepare_inputs(self, pool: BaseModelPool) -> None:
        """What `batches` and `logits` need."""

    @abstractmethod
    def batches(self, task: str) -> Iterator[Any]:
        """Shuffled batches of a task's test inputs, without end."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any, task: str) -> Tensor:
        """A model's predictions, ``(inputs, classes)``."""

    def adapt(self, module: Merged, pool: BaseModelPool) -> None:
        """Adam on the sum of the tasks' entropies, one batch of each a step.

        The model is in evaluation mode, so that what is adapted is what will be evaluated: dropout
        would make noise of the entropies, and batch norms see one task's batch, and move their
        running statistics.
        """
        optimizer = torch.optim.Adam(self.groups(module), lr=self.lr, betas=(0.9, 0.999))
        ready, optimizer = self.fabric.setup(module, optimizer)
        steps = 1 if self.is_debug_mode else self.max_steps
        done = self.resume(module, optimizer)
        if done >= steps:
            return
        batches = {task: self.batches(task) for task in pool.model_names}
        for _ in range(done):  # the run that went so far has seen these
            for batch in batches.values():
                next(batch)
        title = type(self).title
        bar = tqdm(range(done, steps), title, total=steps, initial=done, dynamic_ncols=True)
        for step in bar:
            entropies = self.step(module, ready, batches)
            optimizer.step()
            optimizer.zero_grad()
            mean = sum(entropies.values()) / len(entropies)
            state = self.progress(module)
            metrics = {f"train/{task}_entropy": value for task, value in entropies.items()}
            metrics |= {f"train/{name}": value for name, value in state.items()}
            self.fabric.log_dict({**metrics, "train/entropy": mean}, step=step)
            bar.set_postfix(entropy=f"{mean:.4f}", **{n: f"{v:.1f}" for n, v in state.items()})
            if (step + 1) % self.checkpoint_every == 0 or step + 1 == steps:
                self.keep(module, optimizer, step + 1)

    def step(
        self, module: Merged, ready: nn.Module, batches: dict[str, Iterator[Any]]
    ) -> dict[str, float]:
        """The gradients of one step, and the entropies by task.

        The gradients of all tasks meet in those of the merged weights, and go through the merge
        once: it may well cost more than a task's batch.
        """
        weights = module.weights()
        held = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        module.hold(held)
        entropies = {}
        for task, iterator in batches.items():
            # What entropies add to probabilities before the logarithm is 0 in fp16.
            loss = entropy_loss(self._logits(ready, next(iterator), task).float())
            if not math.isfinite(found := loss.item()):
                raise CartError(
                    f"the entropy of {task}'s predictions is {found}: the merged model has left "
                    "what its numbers can hold; adapt with a lower lr, or start from a smaller "
                    "scaling_factor"
                )
            self.fabric.backward(loss)
            entropies[task] = found
        module.hold(None)
        used = [(weights[name], leaf.grad) for name, leaf in held.items() if leaf.grad is not None]
        torch.autograd.backward([one for one, _ in used], [gradient for _, gradient in used])
        return entropies

    def _logits(self, ready: nn.Module, batch: Any, task: str) -> Tensor:
        """The predictions.

        Raises:
            CartError: the models' numbers and the inputs' do not go together.
        """
        try:
            return self.logits(ready, batch, task)
        except RuntimeError as error:
            narrow = {str(one.dtype) for one in ready.parameters() if one.dtype in _NARROW}
            if narrow and "type" in str(error):
                raise CartError(
                    f"models in {', '.join(sorted(narrow))} do not run on {task}'s inputs: "
                    f"{first_line(error)}; load them with dtype: float32, or adapt with "
                    "fabric.precision=bf16-mixed"
                ) from error
            raise

    def groups(self, module: Merged) -> list[dict[str, Any]]:
        """What the optimizer adapts, in groups of their own learning rates."""
        return [{"params": [module.merge_weight]}]

    def progress(self, module: Merged) -> dict[str, float]:  # noqa: ARG002
        """Further numbers for the progress bar and the log."""
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that a run has to share with the one that it goes on from."""
        names = ("granularity", "lr", "batch_size", "seed")
        return {
            "method": type(self).__name__,
            "tasks": list(self.modelpool.model_names),
            "precision": self.fabric.strategy.precision.precision,
        } | {name: getattr(self, name) for name in names}

    def resume(self, module: Merged, optimizer: Optimizer) -> int:
        """Take up the state of an earlier run, if there is one; return its steps.

        Raises:
            CartError: the state is of another run, or further on.
        """
        path = self.checkpoint_path and Path(self.checkpoint_path)
        if not path or not path.is_file():
            return 0
        precision = self.fabric.strategy.precision
        done = load_state(path, module, optimizer, precision, self.identity)
        if done > self.max_steps:
            raise CartError(
                f"checkpoint_path: {path} is {done} steps on, max_steps is {self.max_steps}; "
                "remove it, or allow as many"
            )
        return done

    def keep(self, module: Merged, optimizer: Optimizer, done: int) -> None:
        """Write the state to go on from, if it is asked for."""
        if self.checkpoint_path is not None:
            path, precision = Path(self.checkpoint_path), self.fabric.strategy.precision
            save_state(path, module, optimizer, precision, done, self.identity)

    def restore(self, path: Path, module: Merged) -> None:
        """Take over what an earlier run has saved."""
        load_adapted(path, module, list(self.modelpool.model_names))

    def finish(self, module: Merged) -> None:
        """Save what is asked for."""
        if self.merging_weights_save_path is not None:
            path = self.place(self.merging_weights_save_path)
            save_adapted(path, module, list(self.modelpool.model_names))
            log.info("what was adapted: %s", path)

    def place(self, given: str) -> Path:
        """Where a file goes: without a folder to the log folder, beside those of other jobs."""
        path = Path(given)
        if self.log_dir is None or given != path.name:
            return path
        path = Path(self.log_dir) / path
        names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
        # All jobs of a multi-run have one log folder: FusionBench 0.2.33 takes the time once.
        return path if not path.exists() else next(name for name in names if not name.exists())
