"""Ray starts while the command imports mergekit and plans, and ends with it."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest

from cart_plugin.cli.merge import MergeCommand, merge
from cart_plugin.distributed import start
from cart_plugin.distributed.start import Start
from cart_plugin.errors import CartError


class Scripted:
    """Stands for Ray: notes what it is asked for."""

    def __init__(self, *, fails: str = "", is_there: bool = False) -> None:
        self.asked: list[str] = []
        self._fails, self._is_there = fails, is_there

    def is_initialized(self) -> bool:
        return self._is_there

    def init(self, **_: Any) -> None:
        self._do("init")

    def _do(self, what: str) -> None:
        if self._fails == what:
            raise Exception("no room\nTraceback ...")  # as Ray does where its node starts too late
        self.asked.append(what)

    def remote(self, _: Any) -> Scripted | None:
        self._do("import")
        return self

    def options(self, **_: Any) -> Any:
        return type("Task", (), {"remote": lambda _: None})()

    def shutdown(self) -> None:
        self.asked.append("shutdown")


class Late(Scripted):
    """A Ray whose processes come too late, so many times."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.threads: list[threading.Thread] = []
        self._late = late

    def init(self, **_: Any) -> None:
        self.threads.append(threading.current_thread())
        if len(self.threads) <= self._late:
            raise Exception("The current node timed out during startup.")
        self._do("init")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    ray = Scripted()
    monkeypatch.setattr(start, "import_ray", lambda: ray)
    return ray


@pytest.mark.parametrize(("workers", "imports"), [(3, 3), (64, 4)])
def test_workers_here_import_before_they_are_needed(
    workers: int, imports: int, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    begun = Start(workers, None)
    assert begun.ray() is scripted
    assert scripted.asked == ["init", *["import"] * imports]
    begun.end()
    begun.end()
    assert scripted.asked[1 + imports :] == ["shutdown"]


def test_a_cluster_is_joined_and_left(scripted: Scripted) -> None:
    begun = Start(3, "auto")
    begun.ray()
    begun.end()
    assert scripted.asked == ["init", "shutdown"]


def test_a_ray_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Scripted(is_there=True)
    monkeypatch.setattr(start, "import_ray", lambda: ray)
    begun = Start(2, None)
    begun.ray()
    begun.end()
    assert ray.asked == []


@pytest.mark.parametrize("what", ["init", "import"])
def test_what_fails_is_told_to_who_asks(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Scripted(fails=what)
    monkeypatch.setattr(start, "import_ray", lambda: ray)
    begun = Start(2, None)
    with pytest.raises(CartError, match=r"cannot start Ray on this machine: .*: no room$"):
        begun.ray()
    begun.end()
    assert ray.asked[-1] == "shutdown"  # nothing of it stays


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_start_that_takes_too_long_is_tried_again(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Late(late)
    monkeypatch.setattr(start, "import_ray", lambda: ray)
    begun = Start(2, None)
    if late == 3:
        with pytest.raises(CartError, match="timed out during startup"):
            begun.ray()
    else:
        assert begun.ray() is ray
    begun.end()
    tries = min(late + 1, 3)
    assert ray.asked.count("shutdown") == tries  # each leaves nothing behind
    assert ray.asked[-1] == "shutdown"
    assert len(set(ray.threads)) == len(ray.threads) == tries


def test_a_cluster_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Late(1)
    monkeypatch.setattr(start, "import_ray", lambda: ray)
    begun = Start(2, "auto")
    with pytest.raises(CartError, match=r"cannot join .* timed out"):
        begun.ray()
    begun.end()
    assert len(ray.threads) == 1


def test_an_address_at_which_nobody_listens_is_told_at_once(scripted: Scripted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        begun = Start(2, f"127.0.0.1:{port}")
        assert begun.ray() is scripted
        begun.end()
    scripted.asked.clear()
    begun = Start(2, f"127.0.0.1:{port}")
    with pytest.raises(CartError, match=rf"the Ray cluster at 127\.0\.0\.1:{port}: .* refused"):
        begun.ray()
    begun.end()
    assert scripted.asked == ["shutdown"]


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        (["--workers", "2"], 2),
        (["--workers=3", "-j", "1", "--cuda", "-v"], 3),
        (["--workers", "1"], None),
        (["--workers", "2", "--ray", "auto"], None),
        (["--workers", "many"], None),
        (["--workers", "2", "--help"], None),
        ([], None),
    ],
)
def test_the_command_starts_ray_before_it_reads_its_options(
    options: list[str], workers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    begun: list[tuple[int, bool]] = []
    ended: list[bool] = []

    class Noted:
        def __init__(self, workers: int, _: None, *, logs: bool) -> None:
            begun.append((workers, logs))

        def end(self) -> None:
            ended.append(True)

    def refuse(*_: object) -> None:
        assert begun == ([] if workers is None else [(workers, "-v" in options)])
        raise click.UsageError("wrong")

    monkeypatch.setattr(start, "Start", Noted)
    monkeypatch.setattr(MergeCommand, "get_params", refuse)
    with pytest.raises(click.UsageError, match="wrong"):
        merge.main([str(recipe), "out", *options], standalone_mode=False)
    assert len(ended) == len(begun) == (workers is not None)
    recipe.unlink()  # for nothing to do there is no need of Ray
    begun.clear()
    monkeypatch.setattr(MergeCommand, "get_params", click.Command.get_params)
    with pytest.raises(click.exceptions.ClickException):
        merge.main([str(recipe), *options, "--what"], standalone_mode=False)
    assert begun == []


def test_starting_ray_imports_nothing_heavy() -> None:
    from subprocess import run

    program = (
        "import sys, cart_plugin.distributed.start; "
        "assert not {'torch', 'mergekit', 'ray'} & set(sys.modules)"
    )
    assert run([sys.executable, "-c", program], check=False).returncode == 0
