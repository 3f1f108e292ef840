"""What `mergekit-cart merge --workers N` asks for: a merge that goes on where one was killed."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.files import (
    MAKING,
    Workplace,
    check_space,
    explain,
    resumable,
    write_json,
    write_text,
)
from cart_plugin.checkpoints.reading import INDEX
from cart_plugin.checkpoints.writing import data_bytes
from cart_plugin.distributed import here, journal, on_ray, plan, progress, tasks, vocabulary
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.plan import Part, Shard
from cart_plugin.distributed.start import Start, import_ray
from cart_plugin.doctor.machine import cores
from cart_plugin.errors import CartError
from cart_plugin.execution import merge, request, routes
from cart_plugin.execution.inputs import read_inputs
from cart_plugin.merging.kept import Kept

_INTERVAL = 0.5  # seconds between two looks at the progress
_LOG = "merge.log"


@dataclass(frozen=True)
class Hands:
    """Who makes the parts of the result.

    Attributes:
        workers: how many at once; None for one here, or as many as a cluster has room for.
        address: of a Ray cluster, or `auto`; None for this machine.
        gpus: each worker's share of a GPU; 0 for the device of mergekit's options.
        start: Ray, if it has been started for them; whoever has done that ends it.
    """

    workers: int | None = None
    address: str | None = None
    gpus: float = 0.0
    start: Start | None = None

    @property
    def is_here(self) -> bool:
        """Whether this process does it alone."""
        return self.address is None and self.workers in (None, 1)


@dataclass(frozen=True)
class Listener:
    """Who hears of a merge in the making.

    Attributes:
        tell: what is being done.
        note: what is worth reading later, too.
        show: the progress, and what there will be in the end: tensors, and bytes.
        log: what mergekit has printed here, if its options ask for it.
    """

    tell: Callable[[str], None]
    note: Callable[[str], None]
    show: Callable[[progress.State, int, int], None]
    log: Callable[[str], None]


def run(
    recipe: Path,
    out: Path,
    options: MergeOptions,
    hands: Hands,
    listener: Listener,
    *,
    force: bool = False,
) -> merge.Outcome:
    """Merge a recipe into a folder that appears whole, after however many runs.

    Args:
        recipe: the YAML file.
        out: the folder, which must not exist.
        options: mergekit's.
        hands: who makes the parts of the result.
        listener: hears of it.
        force: go on where the doctor finds a problem.

    Raises:
        CartError: as `execution.request.run`; or the options do not fit, or a part cannot be made.
            Finished parts stay in a hidden folder beside OUT, and the same command goes on.
    """
    options = _fitting(options, hands)
    if not hands.is_here:
        import_ray()
    request.read(recipe, out)
    with resumable(out) as work, _started(hands, options) as hands:
        try:
            return _Run(recipe, out, options, hands, listener, force, work).run()
        except (CartError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"cannot write {out}: {explain(error)}"
            raise CartError(f"{reason}{_left(work)}") from error
        except KeyboardInterrupt:
            raise CartError(f"interrupted{_left(work) or '; no part was finished'}") from None
        finally:
            if work.keep:
                _left(work)
            log = work.folder / _LOG
            if options.verbosity and log.is_file():
                listener.log(log.read_text(errors="replace"))


@contextmanager
def _started(hands: Hands, options: MergeOptions) -> Iterator[Hands]:
    """Let Ray start, unless it has or none is needed, while the merge is planned."""
    if hands.is_here or hands.start is not None:
        yield hands
        return
    start = Start(hands.workers, hands.address, logs=options.verbosity > 0)
    try:
        yield replace(hands, start=start)
    finally:
        start.end()


def _left(work: Workplace) -> str:
    """What an interrupted run leaves, as the end of a line; nothing is kept if that is nothing.

    Where it cannot be told, all is kept.
    """
    # Without a plan they are of no use.
    planned = (Places(it.parent) for it in work.folder.glob(f"{MAKING}*/plan.json"))
    try:
        folder = next((it for it in planned if it.is_planned), None)
        count = 0 if folder is None else len(plan.parts(plan.read(folder.plan)))
    except (CartError, OSError):
        return ""
    records = 0 if folder is None else len(list(folder.records.glob("*.json")))
    work.keep = records > 0 or any(work.folder.glob("fused/*"))
    if folder is None or not records:
        return ""
    return (
        f"; {records} of {count} parts are finished and kept in {work.folder}: with the same "
        "models and settings the same command goes on from there"
    )


def _fitting(options: MergeOptions, hands: Hands) -> MergeOptions:
    """Mergekit's options, as the workers will have them.

    Raises:
        CartError: some mean nothing here.
    """
    if options.multi_gpu:
        raise CartError(
            "--multi-gpu and --gpu-rich are for one process; with --workers, --gpus 1 gives each "
            "worker a GPU"
        )
    if not options.safe_serialization:
        raise CartError("with --workers the result is safetensors; delete --no-safe-serialization")
    if not 0 <= hands.gpus <= 1:
        raise CartError(
            f"--gpus is each worker's share of one GPU, from 0 to 1, and not {hands.gpus:g}; more "
            "GPUs take more workers"
        )
    changes: dict[str, Any] = {"quiet": True}
    if hands.gpus:
        if hands.address is None and not torch.cuda.is_available():
            raise CartError("--gpus: torch finds no GPU on this machine; leave it out")
        if str(options.device) not in ("cpu", "cuda"):  # the first is what none asked for is
            raise CartError(
                f"--gpus and --device {options.device} are two devices at once; leave --device out"
            )
        changes |= {"cuda": True, "device": "cuda"}
    elif str(options.device).startswith("cuda") and not hands.is_here:
        raise CartError("Ray's workers see only the GPUs that they ask for; pass --gpus 1")
    return options.model_copy(update=changes)


class _Run:
    """One run of a merge, in its steps."""

    def __init__(
        self,
        recipe: Path,
        out: Path,
        options: MergeOptions,
        hands: Hands,
        listener: Listener,
        force: bool,
        work: Workplace,
    ) -> None:
        self._recipe, self._out, self._options = recipe, out, options
        self._hands, self._listener, self._force, self._work = hands, listener, force, work
        self._log = work.folder / _LOG
        shared = torch.get_num_threads() // (hands.workers or 1) if hands.address is None else 1
        self._threads = options.num_threads or max(1, shared)
        self._warnings: list[str] = []

    def run(self) -> merge.Outcome:
        listener, work = self._listener, self._work
        listener.tell("planning")
        prepared = merge.prepare(
            self._recipe, self._options, work.folder, force=self._force, tell=listener.tell
        )
        places, shards = self._plan(prepared)
        parts = plan.parts(shards)
        todo = [part for part in parts if not places.record(part).is_file()]
        check_space(work.folder, sum(part.bytes for part in todo))
        if len(todo) < len(parts):
            finished = f"{len(parts) - len(todo)} of {len(parts)} parts are finished"
            listener.note(f"going on: {finished}, and are made again where they are damaged")
        journal.reserve(places, shards)
        with self._shown(places, parts):
            if self._hands.is_here:
                with self._logged():
                    here.make(places, parts)
            else:
                self._check_cores()
                assert self._hands.start is not None
                workers = on_ray.Workers(
                    self._hands.workers, self._hands.address, self._threads, self._hands.gpus
                )
                on_ray.make(places, parts, workers, self._hands.start, listener.note)
        listener.tell("checking")
        return self._finish(prepared, places, shards)

    def _plan(self, prepared: merge.Prepared) -> tuple[Places, list[Shard]]:
        """The places of this merge, and its shards."""
        whole = self._hands.address is not None
        self._identity = self._identify(prepared)
        places = journal.open_journal(self._work.folder, self._identity, self._listener.note)
        job = replace(self._job(prepared, places), recipe=tasks.everywhere(prepared.inputs))
        job.write(places.job)  # anew: some options may change without a change of the result
        if not places.is_planned:
            with self._logged(), tasks.failures_of_mergekit():
                inputs = read_inputs(job.recipe)
                targets = tasks.planned(job, inputs, self._options)
                tokenizer = tasks.make_tokenizer(targets)
                shards = plan.foresee(targets, inputs, self._options, tokenizer, whole=whole)
            if tokenizer is not None:
                vocabulary.write(places.tokenizer, tokenizer, inputs)
            labels = list(prepared.inputs.checkpoints)
            settings = {
                "threads": self._threads,
                "labels": labels,
                "surroundings": journal.surroundings(inputs, labels),
                "tokenizer": tokenizer is not None,
            }
            write_json(places.settings, settings)
            journal.check_same(self._identity, self._identify(prepared))
            plan.write(places.plan, shards)
        return places, plan.read(places.plan)

    def _identify(self, prepared: merge.Prepared) -> dict[str, Any]:
        """What the result depends on, as it is now."""
        whole = self._hands.address is not None
        route = prepared.choice.route
        return journal.identity(prepared.inputs, route, self._options, self._threads, whole=whole)

    def _job(self, prepared: merge.Prepared, places: Places) -> routes.Job:
        return routes.Job.of(prepared.choice, prepared.inputs, places.model, self._options)

    def _check_cores(self) -> None:
        """Say so where workers of this machine will wait for each other."""
        threads = (self._hands.workers or 1) * self._threads
        if self._hands.address is None and threads > cores():
            self._listener.note(
                f"{threads} threads of the workers share {cores()} cores and will wait for each "
                "other; fewer --workers, or fewer threads each (-j), are faster"
            )

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Keep what mergekit prints off the terminal, and what we warn of for the end."""
        with (
            self._log.open("a") as output,
            contextlib.redirect_stderr(output),
            _logging(output, tasks.log_level(self._options.verbosity)),
            routes.recorded() as told,
        ):
            yield
        self._warnings += told

    @contextmanager
    def _shown(self, places: Places, parts: Sequence[Part]) -> Iterator[None]:
        """Show how far all workers are, from a thread of its own, until the work ends."""
        tensors = sum(len(part.outputs) for part in parts)
        size = sum(part.bytes for part in parts)
        over = threading.Event()

        def show() -> None:
            state = progress.total(places.progress, range(len(parts)))
            self._listener.show(state, tensors, size)

        def watch() -> None:
            while not over.wait(_INTERVAL):
                show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
            show()
        finally:
            over.set()
            thread.join()

    def _finish(
        self, prepared: merge.Prepared, places: Places, shards: Sequence[Shard]
    ) -> merge.Outcome:
        """Add all that is no tensor, check the whole, and give it its name."""
        _leave_only(places.model, {shard.file for shard in shards})
        job = self._job(prepared, places)
        with self._logged():
            options = MergeOptions(**job.options)
            tokenizer = vocabulary.read(places.tokenizer, prepared.inputs)
            tasks.finish(job, options, tokenizer)
        _write_index(places.model, shards)
        records = journal.records(places, plan.parts(shards))
        suspects = {name for record in records for name in record["suspects"]}
        name = self._out.resolve().name
        written = merge.complete(prepared, places.model, name, self._options, suspects)
        journal.check_same(self._identity, self._identify(prepared))
        self._work.publish(places.model)
        found = [*self._warnings, *(text for record in records for text in record["warnings"])]
        kept = Kept()
        for record in records:
            kept.add_data(record["kept"])
        found += filter(None, [kept.warning()])
        choice = prepared.choice
        return merge.Outcome(choice.route, choice.reason, written, list(dict.fromkeys(found)))


@contextmanager
def _logging(output: TextIO, level: int) -> Iterator[None]:
    """Let what is logged go to a file."""
    logger, handler = logging.getLogger(), logging.StreamHandler(output)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def _leave_only(folder: Path, names: set[str]) -> None:
    """Remove what a run that was killed in its last step has written beside the shards."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index as mergekit's `TensorWriter` does."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_size": sum(data_bytes(shard.layout) for shard in shards),
            "mergekit_version": version("mergekit"),
        },
        "weight_map": {it.name: shard.file for shard in shards for it in shard.outputs},
    }
    write_text(folder / INDEX, json.dumps(index, indent=2))
