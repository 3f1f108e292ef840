"""What happens to the shard of a worker that dies: it is asked for again, with what that taught."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import exceptions

from cart_plugin.checkpoints.files import write_json
from cart_plugin.distributed import on_ray, start
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.on_ray import Workers
from cart_plugin.distributed.plan import Output, Part, Shard
from cart_plugin.errors import CartError

GB = 10**9
BIG = {"CPU": 4.0, "GPU": 1.0, "memory": 32.0 * GB}
SMALL = {"CPU": 4.0, "memory": 4.0 * GB}


class Scripted:
    """Stands for Ray: what comes of the tasks is given, and what was asked for is kept."""

    exceptions = exceptions

    def __init__(self, *outcomes: Any, nodes: Sequence[Sequence[dict[str, float]]] = ()) -> None:
        self.outcomes = list(outcomes)
        self.looks = [list(found) for found in nodes] or [[BIG]]
        self.asked: list[dict[str, Any]] = []
        self.cancelled = self.ended = 0

    def remote(self, function: Callable[..., Any]) -> Scripted:
        return self

    def options(self, **asked: Any) -> Any:
        self.asked.append(asked)
        return type("Task", (), {"remote": lambda _, *arguments: (len(self.asked), arguments)})()

    def nodes(self) -> list[dict[str, Any]]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [{"Alive": True, "Resources": node} for node in found]

    def wait(
        self, references: list[Any], timeout: float, num_returns: int = 1
    ) -> tuple[list[Any], list[Any]]:
        if self.cancelled:
            self.ended = num_returns
        if self.outcomes and self.outcomes[0] == "still running":
            self.outcomes.pop(0)
            return [], references
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled += 1


def part(number: int, peak: int = 2 * GB) -> Part:
    outputs = [Output(f"layer{number}.weight", torch.float32, (8, 8), f"t{number}", 100, peak)]
    return Part(Shard(f"model-{number}.safetensors", (tuple(outputs),)), 0)


def work(ray: Scripted, folder: Path, *, count: int = 1, **asked: Any) -> list[str]:
    """Let the workers make shards; the notes about it."""
    notes: list[str] = []
    places = Places(folder)
    places.make()
    workers = Workers(count=1, address=None, threads=1, **asked)
    on_ray._Crew(ray, places, [part(n) for n in range(count)], workers, notes.append).work()
    assert ray.outcomes == []
    return notes


def of_task(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("_task", "traceback", cause)


@pytest.mark.parametrize(
    ("death", "how"),
    [
        (exceptions.OutOfMemoryError("killed"), "ran out of memory"),
        (of_task(MemoryError()), "ran out of memory"),
        (of_task(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "ran out of memory"),
        (exceptions.WorkerCrashedError(), "was killed"),
    ],
)
def test_more_memory_is_asked_for_and_the_tensor_named(
    death: Exception, how: str, tmp_path: Path
) -> None:
    ray = Scripted(death, None)
    Places(tmp_path).make()
    write_json(Places(tmp_path).progress / "00000.json", {"tensor": "layer0.in_hand"})
    (note,) = work(ray, tmp_path)
    assert how in note
    assert "layer0.in_hand" in note
    assert "model-0.safetensors is made again" in note
    first, second = (asked["memory"] for asked in ray.asked)
    assert first == part(0).memory
    assert second == 2 * first


def test_no_more_is_asked_for_than_there_is(tmp_path: Path) -> None:
    ray = Scripted(exceptions.OutOfMemoryError("killed"), None, nodes=[[SMALL]])
    work(ray, tmp_path)
    assert [asked["memory"] for asked in ray.asked] == [part(0).memory, 4 * GB]


def test_the_fifth_death_over_one_shard_ends_the_merge(tmp_path: Path) -> None:
    ray = Scripted(*[exceptions.WorkerCrashedError() for _ in range(5)])
    with pytest.raises(CartError, match=r"5 workers in turn died.*layer0\.weight.*fewer workers"):
        work(ray, tmp_path)


def test_deaths_over_several_shards_do_not_add_up(tmp_path: Path) -> None:
    deaths = [exceptions.WorkerCrashedError(), exceptions.WorkerCrashedError(), None] * 3
    assert len(work(Scripted(*deaths), tmp_path, count=3)) == 6


def test_the_largest_parts_are_made_first(tmp_path: Path) -> None:
    sizes = [8, 64, 16]
    parts = [
        Part(Shard(f"{n}", ((Output("w", torch.float32, (n, n), "t", 1, n * GB),),)), 0)
        for n in sizes
    ]
    ray = Scripted(None, None, None, nodes=[[{**BIG, "memory": 100.0 * GB}]])
    Places(tmp_path).make()
    on_ray._Crew(ray, Places(tmp_path), parts, Workers(1, None, 1), print).work()
    assert [round(asked["memory"] / GB) for asked in ray.asked] == [64, 16, 8]


def test_a_lost_node_is_nobodys_fault(tmp_path: Path) -> None:
    lost = [exceptions.NodeDiedError("gone") for _ in range(6)]
    ray = Scripted(*lost, None)
    notes = work(ray, tmp_path)
    assert len(notes) == 6
    assert "a node is lost; model-0.safetensors is made again elsewhere" in notes[0]
    assert {asked["memory"] for asked in ray.asked} == {part(0).memory}


def test_less_is_asked_for_where_the_large_node_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_CHECK", 0.0)
    tiny = {"CPU": 4.0, "memory": 1.0 * GB}
    ray = Scripted("still running", None, nodes=[[BIG], [tiny], [tiny]])
    work(ray, tmp_path)
    assert [asked["memory"] for asked in ray.asked] == [part(0).memory, 1 * GB]
    assert ray.cancelled == 1


@pytest.mark.parametrize(
    ("nodes", "asked", "lacking"),
    [([SMALL], {"gpus": 1.0}, "1 CPUs and 1 of a GPU"), ([], {}, "none of Ray's 0 nodes")],
)
def test_what_no_node_has_is_not_waited_for(
    nodes: list[dict[str, float]], asked: dict[str, Any], lacking: str, tmp_path: Path
) -> None:
    with pytest.raises(CartError, match=lacking):
        work(Scripted(nodes=[nodes]), tmp_path, **asked)


def test_a_gpu_is_asked_for(tmp_path: Path) -> None:
    ray = Scripted(None)
    work(ray, tmp_path, gpus=0.5)
    assert ray.asked[0]["num_gpus"] == 0.5


def test_what_would_fail_again_ends_the_merge(tmp_path: Path) -> None:
    of_gpu = type("OutOfMemoryError", (RuntimeError,), {})
    for outcome, said in (
        (of_task(of_gpu("CUDA")), "GPU's memory is too small for layer0.weight"),
        (of_task(KeyError("x")), "a worker failed: KeyError"),
        (exceptions.RuntimeEnvSetupError("no"), "Ray cannot start a worker"),
        (exceptions.TaskUnschedulableError("no"), "Ray cannot start a worker"),
        ("the disk is full", "cannot make model-0.safetensors: the disk is full"),
    ):
        with pytest.raises(CartError, match=said):
            work(Scripted(outcome), tmp_path)


def test_workers_that_are_left_have_ended_when_the_merge_fails(tmp_path: Path) -> None:
    # What they write may be removed next.
    ray = Scripted("the disk is full")
    places = Places(tmp_path)
    places.make()
    crew = on_ray._Crew(ray, places, [part(n) for n in range(3)], Workers(3, None, 1), print)
    with pytest.raises(CartError, match="the disk is full"):
        crew.work()
    assert ray.cancelled == ray.ended == 2


def test_a_ray_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Scripted()
    monkeypatch.setattr(ray, "is_initialized", lambda: True, raising=False)
    monkeypatch.setattr(start, "import_ray", lambda: ray)

    def gone() -> None:
        raise exceptions.RpcError("failed to connect to all addresses\nTraceback ...")

    monkeypatch.setattr(ray, "nodes", gone)
    with pytest.raises(CartError, match="Ray has failed: RpcError: failed to connect") as raised:
        on_ray.make(
            Places(tmp_path), [part(0)], Workers(1, "auto", 1), start.Start(1, "auto"), print
        )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_cluster_without_room_is_told_once(
    has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_CHECK", 0.0)
    monkeypatch.setattr(on_ray, "_PATIENCE", 0.0)
    Places(tmp_path).make()
    if has_begun:
        write_json(Places(tmp_path).progress / "00000.json", {})
    notes = work(Scripted(*["still running"] * 3, None), tmp_path, gpus=0.5)
    # Before any is asked for there is nothing to wait for.
    expected = (
        "no worker has begun yet: they are still being started, or Ray waits for 1 free CPUs, 0.5 "
        "of a GPU and"
    )
    assert [note.startswith(expected) for note in notes] == ([] if has_begun else [True])


def test_a_worker_says_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, place: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    assert "does not see" in str(on_ray._task(str(tmp_path / "elsewhere"), 0))
    monkeypatch.setattr("cart_plugin.distributed.part.Workshop", Full)
    assert on_ray._task(str(tmp_path), 0) == "the disk is full"
