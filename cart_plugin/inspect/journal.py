"""Records of what has been measured, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from cart_plugin.checkpoints.files import read_json, write_text
from cart_plugin.errors import CartError

REPORT = "report.json"
KIND = "mergekit-cart inspect"
_WORK = ".measured.jsonl"
_LOCK = ".lock"


class Journal:
    """The records of one inspection in its folder, written as they come; a context manager.

    A line of JSON a weight, after one that says of what. A line that was cut off ends the file.
    """

    def __init__(self, out: Path, key: str) -> None:
        """Open a folder for a report.

        Args:
            out: made if need be.
            key: of all that decides the records.

        Raises:
            CartError: it is no folder, holds another program's report, or is in use.
        """
        self._out, self._key = out, key
        self.records: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None
        if out.exists() and not out.is_dir():
            raise CartError(f"{out} is a file; name a folder for the report")
        self._check_report()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(out / _LOCK, timeout=0)
            self._lock.acquire()
        except Timeout:
            raise CartError(
                f"another inspection is at work in {out}; name another folder"
            ) from None
        except OSError as error:
            raise CartError(f"cannot write {out}: {error.strerror}") from None

    def _check_report(self) -> None:
        """Refuse to write over what is none of ours; take the records of a finished one."""
        try:
            report = read_json(self._out / REPORT)
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            report = {}
        if report.get("kind") != KIND:
            raise CartError(
                f"{self._out / REPORT} is another program's; name another folder for the report"
            )
        if report.get("key") == self._key:
            self.records = {entry["tensor"]: entry for entry in report["records"]}

    def __enter__(self) -> Journal:
        work = self._out / _WORK
        if not self.records and work.exists():
            self.records = dict(self._read(work))
        try:
            # Anew: what a killed run wrote of a line would spoil the next one.
            lines = [{"key": self._key}, *self.records.values()]
            write_text(work, "".join(json.dumps(entry) + "\n" for entry in lines))
            self._file = work.open("a", encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise CartError(f"cannot write {work}: {error.strerror}") from None
        return self

    def _read(self, work: Path) -> Mapping[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        with work.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if number == 0:
                    if entry.get("key") != self._key:
                        break
                    continue
                found[entry["tensor"]] = entry
        return found

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a record."""
        self.records[entry["tensor"]] = entry
        try:
            self._write(entry)
        except OSError as error:
            raise CartError(f"cannot write {self._out}: {error.strerror}") from None

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """All is in the report: the records are of no more use."""
        assert self._file is not None
        self._file.close()
        (self._out / _WORK).unlink(missing_ok=True)

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()
