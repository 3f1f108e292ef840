"""Files and folders that appear whole or not at all, and JSON."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import pytest

from cart_plugin import CartError
from cart_plugin.checkpoints.files import read_json, resumable, unfinished, write_json, write_text


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_that_is_killed_as_it_ends(tmp_path, renamed):
    out, left = tmp_path / "out", tmp_path / ".out.unfinished"
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from cart_plugin.checkpoints.files import unfinished\n"
        "real = os.rename\n"
        "def rename(*places):\n"
        f"    if {renamed}: real(*places)\n"
        "    os._exit(9)\n"
        "with unfinished(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'result').touch()\n"
        "    os.rename = rename\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, out], check=False)
    assert killed.returncode == 9
    assert out.exists() == renamed == (not left.exists())
    if renamed:
        assert (out / "result").exists()
        with pytest.raises(CartError, match="exists; name a new folder"), unfinished(out):
            pass
    else:
        with unfinished(out) as folder:
            assert not (folder / "result").exists()
        assert list(out.iterdir()) == []


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with unfinished(tmp_path / "out") as folder:
            (folder / "result").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "ä"}
    write_json(tmp_path / "one.json", value)
    assert read_json(tmp_path / "one.json") == value
    assert list(read_json(tmp_path / "one.json")) == ["b", "a"]
    write_json(tmp_path / "one.json", value, sort_keys=True)
    assert list(json.loads((tmp_path / "one.json").read_text())) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("text", ["[]", "1", "{", ""])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


def test_work_that_is_kept_is_there_for_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resumable(out) as work:
        (work.folder / "part").touch()
    assert not out.exists()
    with resumable(out) as work:
        assert (work.folder / "part").exists()
        made = work.folder / "made"
        made.mkdir()
        (made / "result").touch()
        work.publish(made)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["result"]


def test_work_that_is_not_kept_is_removed(tmp_path: Path) -> None:
    with resumable(tmp_path / "out") as work:
        work.keep = False
    assert list(tmp_path.iterdir()) == []


def test_kept_work_is_of_this_kind_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), unfinished(out) as folder:
        raise KeyError
    folder.mkdir()  # as a run leaves it that was killed
    (folder / ".mergekit-cart-unfinished").touch()
    (folder / "half").touch()
    with resumable(out) as work:
        assert not (work.folder / "half").exists()
    with pytest.raises(CartError, match="go on with the same command"), unfinished(out):
        pass
    assert work.folder.exists()


@pytest.mark.parametrize("folder_of", [unfinished, resumable])
def test_no_run_comes_in_while_a_failed_one_is_removed(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "out", []
    remove = shutil.rmtree

    def removing(*arguments: Any, **options: Any) -> None:
        with pytest.raises(CartError) as refused, folder_of(out):
            pass
        told.append(str(refused.value))
        remove(*arguments, **options)

    def fail() -> None:
        with folder_of(out) as place:
            folder = getattr(place, "folder", place)
            (folder / "part").mkdir()
            if folder_of is resumable:
                place.keep = False
            monkeypatch.setattr("cart_plugin.checkpoints.files.shutil.rmtree", removing)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(told) == 2  # the part, then the rest
    assert all("another run is writing" in line for line in told)
    assert list(tmp_path.iterdir()) == []


class Unlinking(filelock.FileLock):  # type: ignore[misc, valid-type]
    """As filelock 3.21 to 3.29 has it."""

    def _release(self) -> None:
        Path(self.lock_file).unlink(missing_ok=True)
        super()._release()


def test_work_is_kept_under_a_filelock_that_removes_what_it_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "FileLock", Unlinking)
    out = tmp_path / "out"
    for number in range(3):
        with resumable(out) as work:
            assert len(list(work.folder.glob("part*"))) == number
            (work.folder / f"part{number}").touch()
        with pytest.raises(CartError, match="go on with the same command"), unfinished(out):
            pass
    (work.folder / ".mergekit-cart-unfinished").unlink()  # as releases before this one left it
    with resumable(out) as work:
        assert len(list(work.folder.glob("part*"))) == 3
        work.keep = False
    with unfinished(out) as folder:
        (folder / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "result"]


@pytest.mark.parametrize("folder_of", [unfinished, resumable])
def test_a_file_system_without_locks_is_one_line(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(CartError, match=r"of .* has no locks \(flock\)"),
        folder_of(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
