"""Workers that really die of memory: Ray ends one, and the system another."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from click.testing import Result

from tests.distributed.conftest import contents, recipe_of
from tests.distributed.test_kills import ONE_BY_ONE, start, wait_for, workers

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]

pytestmark = pytest.mark.slow

ROOM = 3_000_000_000  # bytes: more than Ray and a merge of tiny models take
HOG = f"import sys; held = b'x' * {2 * ROOM}; print('full', flush=True); sys.stdin.read()"
# Where systems limit the memory of processes, and in which file.
LIMITS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}


@pytest.fixture
def recipe(saved: Saved, merge: Merge, tmp_path: Path) -> Path:
    """CART of three tiny Llamas, merged in `quiet/out`."""
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    assert merge(recipe, tmp_path / "quiet" / "out", *ONE_BY_ONE).exit_code == 0
    return recipe


def finishes(running: subprocess.Popen[str], folder: Path) -> str:
    """Assert that the merge goes on to its end; the rest of what it says."""
    said = running.communicate()[0]
    assert running.returncode == 0, said
    assert contents(folder / "out") == contents(folder / "quiet" / "out")
    return said


def test_ray_ends_a_worker_where_memory_is_short(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 4 * ROOM:
        pytest.skip("too little memory is free here to make it short")
    used = memory.total - memory.available
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(used + ROOM) / memory.total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    with subprocess.Popen(
        [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "full\n"
            running = start(recipe, tmp_path / "out")
            assert running.stdout is not None
            notes = (line for line in running.stdout if "note: a worker" in line)
            note = next(notes, "")
        finally:
            hog.kill()
    said = finishes(running, tmp_path)
    assert "note: a worker ran out of memory at " in note, note + said


@pytest.fixture
def starve() -> Iterator[Callable[[int], None]]:
    """Takes nearly all memory from a process: the system ends it when it asks for more."""
    place, name = next(
        (it for it in LIMITS.items() if (Path(it[0]) / "cgroup.procs").is_file()), ("/", "")
    )
    group = Path(place) / f"test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        (group / name).write_text("1000000")
        members = (group / "cgroup.procs").open("w")
    except OSError:
        with suppress(OSError):
            group.rmdir()
        pytest.skip("the memory of a process cannot be limited here")

    def take(process: int) -> None:
        members.write(str(process))
        members.flush()

    yield take
    members.close()
    group.rmdir()


def test_the_system_ends_a_worker_that_asks_for_too_much(
    recipe: Path, starve: Callable[[int], None], tmp_path: Path
) -> None:
    running = start(recipe, tmp_path / "out")
    wait_for(lambda: bool(workers(running.pid)) or running.poll() is not None)
    starve(workers(running.pid)[0].pid)
    said = finishes(running, tmp_path)
    assert "note: a worker was killed (if not by you, for its memory) at " in said
