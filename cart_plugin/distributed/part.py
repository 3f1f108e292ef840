"""The making of a part: mergekit's executor, tensor by tensor, with reading ahead of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.graph import Executor, TaskHandle, TaskUniverse
from mergekit.io.tasks import LoaderCache, LoadTensor, SaveTensor
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer

from cart_plugin.checkpoints.files import read_json
from cart_plugin.distributed import journal, plan, tasks, vocabulary
from cart_plugin.distributed.plan import Part
from cart_plugin.distributed.progress import Step
from cart_plugin.distributed.writing import PartFile, ToPart
from cart_plugin.execution.inputs import read_inputs
from cart_plugin.execution.routes import Job, recorded
from cart_plugin.execution.tensorwise import LoadModelTensor
from cart_plugin.mergekit import CartMerge, register


class Workshop:
    """A merge as one process has it: planned once, then a part at a time."""

    def __init__(self, place: Path) -> None:
        """Plan the merge of a journal's folder.

        Raises:
            CartError: mergekit cannot, or finds something else here than where it was planned.
        """
        register()
        self._places = journal.Places(place)
        self._job = Job(**read_json(self._places.job))
        self._options = MergeOptions(**self._job.options)
        torch.set_num_threads(int(read_json(self._places.settings)["threads"]))
        self._parts = plan.parts(plan.read(self._places.plan))
        inputs = read_inputs(self._job.recipe)
        self._inputs, self._found = inputs, journal.presence(inputs)
        journal.check_surroundings(self._places, inputs)
        tasks.log_as_asked(self._options.verbosity)
        found = tasks.planned(self._job, inputs, self._options, self._read)
        self._tasks = {tasks.key(task): task for task in tasks.saves(found)}
        self._step: Step | None = None
        self._tokenizer = vocabulary.read(self._places.tokenizer, inputs)

    def _read(self, count: int) -> None:
        if self._step is not None:
            self._step.read(count)

    def make(self, number: int) -> None:
        """Make a part, unless it is there and whole.

        Raises:
            CartError: it cannot be made.
            OSError: it cannot be written.
        """
        part = self._parts[number]
        self._step = Step(self._places.progress, number)
        if journal.is_whole(self._places, part):
            self._step.skip(len(part.outputs), part.bytes)
            return
        with recorded() as told, PartFile(self._places.model, part, self._step.wrote) as file:
            self._merge(part, file)
        if (found := journal.presence(self._inputs)) != self._found:
            journal.check_surroundings(self._places, self._inputs)
            self._found = found  # the same again
        journal.record(
            self._places,
            part,
            {
                "digests": file.digests,
                "suspects": file.suspects,
                "kept": self._kept(part),
                "warnings": list(dict.fromkeys(told)),
            },
        )
        self._step.flush()

    def _merge(self, part: Part, file: PartFile) -> None:
        """Merge the tensors one by one; the next one's inputs are read meanwhile."""
        outputs: dict[str, list[plan.Output]] = {}
        for output in part.outputs:
            outputs.setdefault(output.task, []).append(output)
        pieces = (_Piece(self._handing(key, file)) for key in outputs)
        setup = partial(_set_up, self._options)
        with ThreadPoolExecutor(1, initializer=setup) as ahead:
            piece = next(pieces)
            values = ahead.submit(piece.load, self._tokenizer)
            for key, made in outputs.items():
                assert self._step is not None
                self._step.start(made[0].name, sum(it.peak for it in made))
                following = next(pieces, None)
                loaded = values.result()
                if following is not None:
                    values = ahead.submit(following.load, self._tokenizer)
                self._seed(key)
                piece.run(self._options, loaded)
                del loaded
                if following is not None:
                    piece = following
                self._step.done(len(made))

    def _handing(self, key: str, file: PartFile) -> tasks.Save:
        """The task of a key, with the part's file as its writer."""
        task = self._tasks[key]
        name = "writer_task" if isinstance(task, SaveTensor) else "writer"
        changed: tasks.Save = task.model_copy(update={name: ToPart(file=file)})
        return changed

    def _seed(self, key: str) -> None:
        """Let random methods draw the same for a tensor, whoever merges it after whatever else."""
        from transformers import set_seed

        text = f"{self._options.random_seed or 0}:{key}"
        set_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big"))

    def _kept(self, part: Part) -> Mapping[str, Any]:
        """What `cart` has kept of the models' differences."""
        methods = [it for it in merge_methods.registered_methods() if isinstance(it, CartMerge)]
        found: dict[str, Any] = {}
        for method in methods:
            if method.kept is not None:
                found |= method.kept.data(output.name for output in part.outputs)
        return found


def _set_up(options: MergeOptions) -> None:
    LoaderCache().setup(options=options)  # mergekit has one for each thread


class _Piece:
    """One task of the plan with all that it needs."""

    def __init__(self, save: tasks.Save) -> None:
        self._universe = TaskUniverse([save])
        target = self._universe.get_handle(save)
        assert target is not None
        self._target: TaskHandle = target

    def load(self, tokenizer: Any) -> dict[TaskHandle, Any]:
        """Read the inputs; the tokenizer, which all workers share, stands for its task."""
        values: dict[TaskHandle, Any] = {}
        for task in self._universe.tasks:
            handle = self._universe.get_handle(task)
            assert handle is not None
            if isinstance(task, BuildTokenizer):
                values[handle] = tokenizer
            elif isinstance(task, LoadTensor | LoadModelTensor):
                values[handle] = task.execute()
        return values

    def run(self, options: MergeOptions, values: dict[TaskHandle, Any]) -> None:
        """Merge and hand over, with inputs that have been read."""
        executor = Executor(
            [self._target],
            math_device=options.device,
            storage_device=options.device if options.low_cpu_memory else "cpu",
            cached_values=values,
        )
        for _ in executor.run(quiet=True):
            pass
