"""Downloads: whole or not at all, checked, errors that say what to do. Clients are stand-ins."""

import stat
import sys
import zipfile

import pytest

from benchmarks.common import sources
from benchmarks.common.cache import file_sha256, new_folder, read_manifest
from benchmarks.common.sources import Source, SourceError, fetch


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Put a shell script in the place of a client; it logs its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name, body):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    write.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return write


@pytest.fixture
def wheel(tmp_path):
    """A small wheel on disk."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.txt", "data")
    return path


@pytest.fixture
def pip(client, wheel, monkeypatch):
    """A pip that serves the wheel."""
    client("python", f'while [ "$1" != --dest ]; do shift; done; cp {wheel} "$2"')
    monkeypatch.setattr(sys, "executable", "python")
    return client


def test_a_wheel_is_unpacked_with_a_manifest(cache, pip, wheel):
    source = Source("pip", "thing", "1.0", file_sha256(wheel))
    folder = fetch([source])["thing"]
    assert (folder / "thing" / "data.txt").read_text() == "data"
    assert read_manifest(folder)["sha256"] == file_sha256(wheel)


def test_what_is_there_is_not_fetched_again(cache, pip):
    source = Source("pip", "thing", "1.0")
    fetch([source])
    fetch([source, source])
    assert len(pip.calls()) == 1


def test_a_wrong_checksum_is_refused_and_leaves_nothing(cache, pip):
    source = Source("pip", "thing", "1.0", "0" * 64)
    with pytest.raises(
        SourceError, match=r"SHA-256 is .* expected 0000.* run the same command again"
    ):
        fetch([source])
    assert not source.folder.exists()


def test_a_cut_off_download_is_refused_and_leaves_nothing(cache, pip, wheel):
    wheel.write_bytes(wheel.read_bytes()[:40])
    source = Source("pip", "thing", "1.0")
    with pytest.raises(SourceError, match=r"Cannot unpack thing-1.0.*run the same command again"):
        fetch([source])
    assert list((cache / "sources").iterdir()) == []


def test_a_failing_client_says_why_in_one_line(cache, client, monkeypatch):
    client("python", 'echo "looking" >&2; echo "ERROR: No matching distribution" >&2; exit 1')
    monkeypatch.setattr(sys, "executable", "python")
    with pytest.raises(SourceError) as caught:
        fetch([Source("pip", "thing", "1.0")])
    message = str(caught.value)
    assert "thing 1.0 from PyPI: ERROR: No matching distribution" in message
    assert "check the network" in message
    assert "\n" not in message


def test_a_missing_client_is_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match=r"`npm` does not run. Install npm \(it comes with Node"):
        fetch([Source("npm", "@scope/thing", "1.0")])


def test_apt_without_lists_is_updated_as_root(cache, client, monkeypatch, tmp_path):
    client(
        "apt-get",
        f'if [ "$1" = update ]; then touch {tmp_path}/lists; exit 0; fi\n'
        f"test -e {tmp_path}/lists || {{ echo 'E: Unable to locate package' >&2; exit 100; }}\n"
        "touch thing_1_all.deb",
    )
    client("dpkg-deb", 'touch "$3/font.ttf"')
    monkeypatch.setattr(sources, "_is_root", lambda: True)
    folder = fetch([Source("apt", "thing")])["thing"]
    assert (folder / "font.ttf").exists()
    assert [call.split()[0] for call in client.calls()] == ["download", "update", "download", "-x"]


def test_apt_without_lists_tells_others_what_to_run(cache, client, monkeypatch):
    client("apt-get", "echo 'E: Unable to locate package thing' >&2; exit 100")
    monkeypatch.setattr(sources, "_is_root", lambda: False)
    with pytest.raises(SourceError, match=r"Unable to locate package thing.*sudo apt-get update"):
        fetch([Source("apt", "thing")])


def test_a_folder_appears_only_when_its_block_ends(tmp_path):
    target = tmp_path / "result"

    def fill_and_fail():
        with new_folder(target) as folder:
            (folder / "half").touch()
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
