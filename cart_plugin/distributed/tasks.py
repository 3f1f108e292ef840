"""The tasks of a merge, taken from mergekit before it runs them, and what is left to do after them.

mergekit's `run_merge` plans, executes and writes config and tokenizer in one call. An executor of
our own in it sees the plan; another one, when all tensors are written, leaves only the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from mergekit.common import ModelReference
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from cart_plugin.distributed.reading import Reader
from cart_plugin.doctor.layout import references
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution.inputs import Inputs, plain
from cart_plugin.execution.routes import ROUTES, Job
from cart_plugin.execution.tensorwise import LoadModelTensor, SaveUnit

Save: TypeAlias = SaveTensor | SaveUnit
"""What writes a tensor of the result, or a few that belong together."""


class _Planned(Exception):  # noqa: N818 - no error: how the plan leaves `run_merge`
    def __init__(self, targets: list[Task]) -> None:
        super().__init__()
        self.targets = targets


def everywhere(inputs: Inputs) -> dict[str, Any]:
    """A recipe as plain data that means the same in any folder and on any machine.

    Its models are as many as the recipe's, in its order.
    """
    paths: dict[str, str] = {}
    for label, held in inputs.checkpoints.items():
        # `..` stays as it is: after a link it is another folder than the text says.
        path = str(held.path.absolute())
        while path in paths.values():  # mergekit takes one folder in two spellings for two models
            path += "/."
        paths[label] = path

    def absolute(model: ModelReference) -> ModelReference:
        parts: dict[str, Any] = {"model": {"path": paths[str(model)]}}
        if model.override_architecture is not None:
            parts["override_architecture"] = model.override_architecture
        return ModelReference.model_validate(parts)

    named = set(references(inputs.config))

    def known(model: ModelReference) -> ModelReference:
        return absolute(model) if str(model) in named else model

    return plain(inputs.config, known)


def planned(job: Job, inputs: Inputs, options: MergeOptions, count: Any = None) -> list[Task]:
    """The tasks that a job gives to mergekit's executor; nothing is loaded or written.

    Args:
        job: the merge.
        inputs: its models.
        options: mergekit's.
        count: receives the bytes of each tensor that a task reads.

    Raises:
        CartError: mergekit cannot plan it.
    """

    def capture(targets: list[Task], **_: Any) -> Any:
        raise _Planned(targets)

    LoaderCache().loaders.clear()  # of another merge in this process
    LoaderCache().setup(options=options)
    readers = _readers(inputs, options, count)
    LoaderCache().loaders.update(readers)
    with failures_of_mergekit():
        try:
            ROUTES[job.route](job, options, capture)
        except _Planned as found:
            tasks = found.targets
        else:
            raise AssertionError("mergekit has merged without its executor")
    by_folder = {reader.folder: reader for reader in readers.values()}
    for task in saves(tasks):
        for load in _loads(task):
            load.source.loader = by_folder[load.source.loader.index.base_path]
    return tasks


def saves(tasks: list[Task]) -> list[Save]:
    """Those of a plan's tasks that write tensors, in the order of planning."""
    return [task for task in tasks if isinstance(task, Save)]


def _readers(inputs: Inputs, options: MergeOptions, count: Any) -> Mapping[ModelReference, Reader]:
    return {
        model: Reader(inputs.checkpoints[label], count, lazy_unpickle=options.lazy_unpickle)
        for label, model in references(inputs.config).items()
    }


def _loads(task: Task) -> Iterator[LoadModelTensor]:
    if isinstance(task, LoadModelTensor):
        yield task
    elif isinstance(task, SaveTensor):
        return  # mergekit's own take the loaders of its cache
    else:
        for other in task.arguments().values():
            yield from _loads(other)


def key(task: Save) -> str:
    """What a task is known by in another process."""
    return task.tensor_name if isinstance(task, SaveTensor) else str(task.unit.targets[0])


def written_order(tasks: list[Task]) -> list[Save]:
    """The writing ones of a whole plan as mergekit's executor gets to them: so it fills shards."""
    return saves([handle.task() for handle in Executor(tasks).schedule.tasks])


def make_tokenizer(tasks: list[Task]) -> TokenizerInfo | None:
    """The tokenizer that a recipe asks for, and which rows of the models' tables it takes.

    It has to be made once for all workers: of several vocabularies mergekit makes one in an order
    that differs each time, and rows by two orders would be a broken model.
    """
    return next((task.execute() for task in tasks if isinstance(task, BuildTokenizer)), None)


def finish(job: Job, options: MergeOptions, tokenizer: TokenizerInfo | None) -> None:
    """Write what mergekit writes beside the tensors: config, tokenizer.

    Args:
        job: the merge; its tensors are in its folder.
        options: mergekit's.
        tokenizer: by `make_tokenizer`, as the tensors have been made with.

    Raises:
        CartError: it cannot.
    """

    class Rest:
        def __init__(self, targets: list[Task], **_: Any) -> None:
            done = (SaveTensor, SaveUnit, FinalizeModel)
            self._targets = [task for task in targets if not isinstance(task, done)]

        def run(self, quiet: bool = False) -> Iterator[tuple[Task, Any]]:  # noqa: ARG002
            for task in self._targets:
                assert isinstance(task, BuildTokenizer), task
                yield task, tokenizer

    LoaderCache().loaders.clear()  # of another merge in this process
    with failures_of_mergekit():
        ROUTES[job.route](job, options, Rest)


def log_as_asked(verbosity: int) -> None:
    """Print what mergekit logs, as its `-v` asks for it; it does the same at its start.

    Without effect where somebody takes the log already.
    """
    logging.basicConfig(level=log_level(verbosity))


def log_level(verbosity: int) -> int:
    """Of what mergekit logs, what is asked for by so many `-v`."""
    return {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)


@contextmanager
def failures_of_mergekit() -> Iterator[None]:
    """Turn whatever mergekit stops at into a line.

    Raises:
        CartError: it has stopped.
        OSError: a file cannot be written.
    """
    try:
        yield
    except (CartError, OSError):
        raise
    except Exception as error:
        raise CartError(f"mergekit failed: {first_line(error)}") from error
