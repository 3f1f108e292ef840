"""Ten kills at random moments, and a node that goes: the bytes are those of a quiet merge."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from click.testing import Result

from tests.distributed.conftest import contents, recipe_of, records, shards

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]
ONE_BY_ONE = ("--out-shard-size", "1")  # a file for each of the 48 tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cart_plugin", "merge", str(recipe), str(out)]
    command += ["--workers", "2", *ONE_BY_ONE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(driver: int) -> list[psutil.Process]:
    """Ray's processes under a driver that make shards."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "ray::_task" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def end(processes: list[psutil.Process]) -> None:
    """End what a killed driver has left of its Ray: it would go by itself, some of it slowly."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=60)


def test_ten_kills_at_random_moments(saved: Saved, merge: Merge, tmp_path: Path) -> None:
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    assert merge(recipe, tmp_path / "quiet" / "out", *ONE_BY_ONE).exit_code == 0
    draw = random.Random(0)
    finished: dict[str, int] = {}
    for _ in range(5):  # a worker is killed, and then the driver
        running = start(recipe, tmp_path / "out")
        goal = len(finished) + draw.randint(0, 3)
        wait_for(lambda: bool(workers(running.pid)) or running.poll() is not None)  # noqa: B023
        assert running.poll() is None, running.communicate()[0]
        time.sleep(draw.random() / 50)
        for worker in workers(running.pid)[:1]:
            worker.kill()
        wait_for(lambda: len(records(tmp_path)) >= goal)  # noqa: B023
        time.sleep(draw.random() / 50)
        family = psutil.Process(running.pid).children(recursive=True)
        running.kill()
        running.communicate()
        end(family)
        assert not (tmp_path / "out").exists()
        now = shards(tmp_path)
        assert finished.items() <= now.items()  # none is made twice
        finished = now
    assert 0 < len(finished) < 48
    running = start(recipe, tmp_path / "out")
    said = running.communicate()[0]
    assert running.returncode == 0, said
    assert f"going on: {len(finished)} of 48 parts are finished" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet" / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert times == finished


def test_a_killed_worker_takes_only_its_shard_with_it(
    saved: Saved, merge: Merge, tmp_path: Path
) -> None:
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    assert merge(recipe, tmp_path / "quiet" / "out", *ONE_BY_ONE).exit_code == 0
    running = start(recipe, tmp_path / "out")
    wait_for(lambda: bool(workers(running.pid)) or running.poll() is not None)
    assert running.poll() is None, running.communicate()[0]
    (worker, *_) = workers(running.pid)
    assert worker.nice() == psutil.Process().nice()  # low, beside others it would stand still
    worker.kill()
    said = running.communicate()[0]
    assert running.returncode == 0, said
    assert "note: a worker was killed (if not by you, for its memory) at " in said
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet" / "out")


@pytest.fixture
def cluster() -> Iterator[object]:
    """Three nodes on this machine, of which the first only holds the driver."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_removed_in_mid_merge(
    cluster: object, saved: Saved, merge: Merge, tmp_path: Path
) -> None:
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    assert merge(recipe, tmp_path / "quiet" / "out", *ONE_BY_ONE).exit_code == 0
    removed: list[int] = []

    def remove() -> None:
        wait_for(lambda: len(records(tmp_path)) >= 3)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)  # type: ignore[attr-defined]
        removed.append(len(records(tmp_path)))

    thread = threading.Thread(target=remove)
    thread.start()
    address = cluster.address  # type: ignore[attr-defined]
    done = merge(recipe, tmp_path / "out", "--ray", address, "-j", 1, *ONE_BY_ONE)
    thread.join()
    assert done.exit_code == 0, done.output
    assert removed
    assert removed[0] < 48
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet" / "out")
