"""Folders to write, full disks and killed runs: nothing that looks finished, and a way to go on."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from cart_plugin import CartError
from cart_plugin.checkpoints import writing
from cart_plugin.checkpoints.files import unfinished
from cart_plugin.compress import adapters, compress, expand, run, tasks
from tests.compress.models import TASKS, save_tasks, tensors
from tests.compress.refused import refusal


def test_a_folder_that_exists_is_left_alone(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CartError, match="exists; name a new folder"):
        compress(models, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(models, tmp_path):
    (tmp_path / "out").mkdir()
    compress(models, tmp_path / "out")
    assert tasks(tmp_path / "out") == list(TASKS)


def test_a_folder_of_another_is_not_cleared(models, tmp_path):
    other = tmp_path / ".out.unfinished"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(CartError, match="in the way"):
        compress(models, tmp_path / "out")
    assert (other / "mine").exists()


def no_work(*arguments, **options):
    pytest.fail("the work began")


def test_the_current_folder_is_refused_before_the_work(models, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(run, "write_base", no_work)
    with pytest.raises(CartError, match="is the current folder and cannot be replaced"):
        compress(models, ".")


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(models, tmp_path, monkeypatch):
    def busy(self):
        raise OSError(errno.EBUSY, "Device or resource busy")  # as of a mount point

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "rmdir", busy)
    monkeypatch.setattr(run, "write_base", no_work)
    with pytest.raises(CartError, match=r"out cannot be replaced \(Device or resource busy\)"):
        compress(models, tmp_path / "out")


def test_a_link_to_an_empty_folder(models, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    compress(models, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert tasks(tmp_path / "disk") == list(TASKS)


def test_two_runs_do_not_mix(models, tmp_path):
    with unfinished(tmp_path / "out"):
        with pytest.raises(CartError, match="another run is writing"):
            compress(models, tmp_path / "out")
        assert (tmp_path / ".out.unfinished").exists()


def test_too_small_a_disk_is_noticed_before(models, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(1, 1, 1000))
    assert "1,000 bytes free and" in refusal(models, tmp_path)


def test_a_disk_that_runs_full(models, tmp_path, monkeypatch):
    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.TensorFile, "write", full)
    assert "the disk is full" in refusal(models, tmp_path)


def test_an_error_half_way_leaves_nothing(models, tmp_path, monkeypatch):
    done = []

    def broken(*arguments):
        done.append(arguments)
        if len(done) == 4:
            raise RuntimeError("half-way")
        return real(*arguments)

    real = adapters.decompose
    monkeypatch.setattr(adapters, "decompose", broken)
    with pytest.raises(RuntimeError, match="half-way"):
        compress(models, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TASKS)


def test_a_killed_run_leaves_nothing_finished_and_the_next_completes(models, tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, sys\n"
        "from cart_plugin.compress import adapters, run\n"
        "real, done = adapters.decompose, []\n"
        "def kill(*arguments):\n"
        "    done.append(1)\n"
        "    if len(done) == 4: os._exit(9)\n"
        "    return real(*arguments)\n"
        "adapters.decompose = kill\n"
        "run.compress(sys.argv[2:], sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, out, *models], check=False)
    assert killed.returncode == 9
    assert not out.exists()
    left = tmp_path / ".out.unfinished"
    assert left.is_dir()
    assert not (left / "report.json").exists()
    compress(models, out)
    assert not left.exists()
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "base", "report.json"]
    fresh = compress(models, tmp_path / "fresh")
    for task in TASKS:
        one, other = (tensors(place / "adapters" / task) for place in (out, fresh.out))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"rank_ratio": 0.25}),  # some layers have biases and some have none
        ("llama", {"target_size": 0.8}),
        ("llama", {"target_size": 0.8, "layout": "servers"}),
    ],
)
def test_torchs_default_device_does_not_matter(kind, options, tmp_path):
    def made(name):
        report = compress(models, tmp_path / name, **options)
        expand(report.out, "two", tmp_path / f"{name}-full")
        found = sorted(tmp_path.glob(f"{name}*/**/*.safetensors"))
        assert len(found) > len(TASKS)
        return {str(file.relative_to(tmp_path))[len(name) :]: file.read_bytes() for file in found}

    models = save_tasks(tmp_path, kind, num_hidden_layers=1)
    expected = made("here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in other threads it is the CPU
    torch.set_default_device("meta")
    try:
        found = made("there")
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(threads)
    assert found == expected
