"""Files and folders that appear whole or not at all; JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_plugin.errors import CartError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_MARK = ".mergekit-cart-unfinished"  # whose the folder is
_LOCK = ".mergekit-cart-lock"  # another file, because filelock 3.21 to 3.29 removes what it locks
MAKING = "merge-"  # how names of results in the making begin, there
_KEPT = ".mergekit-cart-resumable"  # beside the mark, in what `resumable` has made


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def json_text(value: object, *, sort_keys: bool = False) -> str:
    """A value as the project writes JSON: two spaces a level, a line break at the end."""
    return json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"


def write_json(file: Path, value: object, *, sort_keys: bool = False) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json_text(value, sort_keys=sort_keys))


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(file) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside ``file`` to write to, which takes its place if all goes well."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        yield scratch
        scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if all goes well, and else is removed.

    What a killed run has left there is removed, too. Mark and lock in it stay until it has its
    name: a run that is killed just then leaves a finished folder with empty files that nobody
    reads.

    Raises:
        CartError: ``out`` exists, or cannot be replaced; another run is writing it, or has left
            there what can be resumed; or the disk is full.
    """
    out = out.resolve()  # "." has no name, and a link is no folder to be replaced
    folder, lock = _claim(out)
    if (folder / _KEPT).exists():
        lock.release()
        raise CartError(
            f"{folder} holds what an interrupted merge with --workers has finished; go on with "
            "the same command, or remove the folder"
        )
    done = False
    try:
        _clear(folder)
        yield folder
        if out.exists():
            out.rmdir()  # empty, as seen above: else this fails
        os.rename(folder, out)
        done = True
        for name in (_LOCK, _MARK):
            with suppress(OSError):
                (out / name).unlink()
    except OSError as error:
        reason = explain(error)
        raise CartError(f"cannot write {out}: {reason}; nothing is left of it") from error
    finally:
        if not done:
            _remove(folder)
        lock.release()


@dataclass
class Workplace:
    """A folder beside a result in the making, for work that goes on after an interruption.

    Attributes:
        folder: the place.
        out: the result's folder, which is not there yet.
        keep: whether the folder outlives a run that fails; without it nothing is left.
    """

    folder: Path
    out: Path
    keep: bool = False

    def publish(self, made: Path) -> None:
        """Give a finished folder inside this one the result's name; the rest is removed."""
        if self.out.exists():
            self.out.rmdir()  # empty, as `resumable` has seen: else this fails
        os.rename(made, self.out)
        self.keep = False


@contextmanager
def resumable(out: Path) -> Iterator[Workplace]:
    """A folder beside ``out`` that holds what runs that were killed have finished.

    Raises:
        CartError: as `unfinished`; what is left there of a run of that kind is removed.
    """
    out = out.resolve()
    folder, lock = _claim(out)
    work = Workplace(folder, out, keep=True)
    try:
        if not (folder / _KEPT).exists():
            _clear(folder)
            (folder / _KEPT).touch()
        yield work
    finally:
        if not work.keep:
            _remove(folder)
        lock.release()


def left_bytes(out: Path) -> int:
    """Bytes of what interrupted runs have left beside ``out`` for the next one."""
    folder = _beside(out.resolve())
    if not (folder / _KEPT).exists():
        return 0
    # Parts of the result, and models that have been fused for it.
    kinds = (f"{MAKING}*/**/*", "fused/fused-*/**/*")
    left = [path for kind in kinds for path in folder.glob(kind)]
    return sum(_room(path.stat()) for path in left if path.is_file())


def _room(file: os.stat_result) -> int:
    """Bytes that a file takes on the disk: of a file that is partly written, that part."""
    blocks = getattr(file, "st_blocks", None)
    return file.st_size if blocks is None else min(file.st_size, 512 * blocks)


def _beside(out: Path) -> Path:
    return out.parent / f".{out.name}.unfinished"


def explain(error: OSError) -> str:
    """Why a file cannot be written, in the words of users."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else error.strerror or str(error)


def _claim(out: Path) -> tuple[Path, BaseFileLock]:
    """The folder beside ``out`` that its maker works in, and the lock that makes it the only one.

    Raises:
        CartError: ``out`` exists, or cannot be replaced; another run is writing it; or its file
            system has no locks.
    """
    from filelock import Timeout

    _check_way(out)
    place = out.parent
    folder = _beside(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        is_ours = any((folder / name).exists() for name in (_MARK, _LOCK, _KEPT))
        if folder.exists() and any(folder.iterdir()) and not is_ours:
            raise CartError(f"{folder} is in the way and not of this program; remove it")
        folder.mkdir(exist_ok=True)
        lock = _locked(folder / _LOCK)
        (folder / _MARK).touch()
    except Timeout:
        raise CartError(f"another run is writing {out}; wait for it, or name another") from None
    except OSError as error:
        raise CartError(f"{place}: {error.strerror}") from None
    return folder, lock


def _locked(file: Path) -> BaseFileLock:
    """The lock of a file, held.

    Raises:
        CartError: the file system has none. A lock that is a file's presence, which filelock takes
            instead, would outlive a run that is killed.
        Timeout: another process holds it.
    """
    from filelock import FileLock, SoftFileLock

    lock: BaseFileLock = FileLock(file, timeout=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is an error here
            lock.acquire()
    except NotImplementedError:  # filelock before 3.21
        pass
    else:
        if not isinstance(lock, SoftFileLock):
            return lock
    lock.release()
    with suppress(OSError):
        file.unlink(missing_ok=True)
        file.parent.rmdir()  # unless there is something in it
    raise CartError(
        f"the file system of {file.parent.parent} has no locks (flock), which keep two runs apart; "
        "name a folder on another one, or mount it with them (Lustre: -o flock)"
    )


def _remove(folder: Path) -> None:
    """Remove a folder whose lock is held, so that nobody else is in it; mark and lock go last."""
    with suppress(OSError):
        _clear(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        if left.name not in (_MARK, _LOCK):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _check_way(out: Path) -> None:
    """Refuse a folder that cannot be replaced, before the work rather than after it.

    Raises:
        CartError: it holds something, or is a mount point, the current folder, or protected.
    """
    try:
        if not out.exists():
            return
    except OSError as error:  # a parent that may not be entered
        raise CartError(f"{out}: {error.strerror}; name another folder") from None
    try:
        if out.samefile("."):
            raise CartError(f"{out} is the current folder and cannot be replaced; name a new one")
        if not out.is_dir() or any(out.iterdir()):
            raise CartError(f"{out} exists; name a new folder, or remove it")
        out.rmdir()
        out.mkdir()
    except OSError as error:
        raise CartError(
            f"{out} cannot be replaced ({error.strerror}); name a new folder, such as one inside it"
        ) from None


def check_space(place: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        CartError: fewer bytes are free.
    """
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CartError(
            f"{place.parent} has {free:,} bytes free and {needed:,} are needed; make room or name "
            "another folder"
        )
