"""What an interrupted merge leaves, and how the next run goes on from it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from cart_plugin.checkpoints.files import left_bytes, resumable, unfinished
from cart_plugin.distributed import journal, plan
from tests.distributed.conftest import SHARDS, contents, left, recipe_of, records, shards
from tests.distributed.test_bytes import byte_pairs, rows_by_token
from tests.doctor.tiny import edit_weights, save_models, write_recipe
from tests.execution.test_command import refuses

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


@pytest.fixture
def expected(merge: Merge, recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the merge gives that is not interrupted."""
    assert merge(recipe, tmp_path / "whole" / "out", *SHARDS).exit_code == 0
    return contents(tmp_path / "whole" / "out")


def test_a_full_disk_is_one_line_and_loses_no_finished_shard(
    merge: Merge, interrupted: Merge, recipe: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    done = interrupted(recipe, tmp_path / "out")
    finished = shards(tmp_path)
    assert 2 <= len(finished) < 12
    refuses(done, "the disk is full", f"{len(finished)} of 12 parts are finished and kept in")
    assert left(tmp_path) == [".out.unfinished"]
    kept = next(tmp_path.glob(".out.unfinished/merge-*/model"))
    before = {name: (kept / name).stat().st_ino for name in finished}
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    assert f"note: going on: {len(finished)} of 12 parts are finished" in done.output
    assert contents(tmp_path / "out") == expected
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == before
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    assert left(tmp_path) == ["out"]


def test_nothing_is_left_of_a_merge_that_has_finished_nothing(
    merge: Merge, full_disk: Callable[[int], None], recipe: Path, tmp_path: Path
) -> None:
    full_disk(1)
    refuses(merge(recipe, tmp_path / "out", "--workers", 1), "the disk is full")
    assert left(tmp_path) == []


def test_a_finished_shard_that_has_changed_is_made_again(
    merge: Merge, interrupted: Merge, recipe: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    interrupted(recipe, tmp_path / "out")
    model = next(tmp_path.glob(".out.unfinished/merge-*/model"))
    first, second, *_ = sorted(model.glob("*.safetensors"))
    held = bytearray(first.read_bytes())
    held[-1] ^= 1
    first.write_bytes(held)
    second.write_bytes(second.read_bytes()[:-4])
    assert merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS).exit_code == 0
    assert contents(tmp_path / "out") == expected


def test_of_one_shard_pieces_are_kept(
    merge: Merge,
    full_disk: Callable[[int], dict[str, int]],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_PIECE", 20_000)
    full_disk(16)
    refuses(merge(recipe, tmp_path / "out", "--workers", 1), "of 12 parts are finished and kept")
    count = len(records(tmp_path))
    assert count >= 2
    written = full_disk(0)
    done = merge(recipe, tmp_path / "out", "--workers", 1)
    assert f"going on: {count} of 12 parts are finished" in done.output
    assert written["written"] < 48 - 2 * count
    assert merge(recipe, tmp_path / "whole" / "out").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_another_recipe_starts_anew(
    merge: Merge, interrupted: Merge, recipe: Path, saved: Saved, tmp_path: Path
) -> None:
    interrupted(recipe, tmp_path / "out")
    other = recipe_of("linear", saved("llama"), tmp_path)
    done = merge(other, tmp_path / "out", "--workers", 1, *SHARDS)
    assert "note: starting anew: the recipe has changed" in done.output
    assert merge(other, tmp_path / "whole" / "out", *SHARDS).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_another_input_starts_anew_and_is_named(
    merge: Merge, interrupted: Merge, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    interrupted(recipe, tmp_path / "out")
    edit_weights(models[1], lambda held: held["model.norm.weight"].add_(1))
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert f"starting anew: model {models[1]} has changed (model.safetensors)" in done.output
    assert merge(recipe, tmp_path / "whole" / "out", *SHARDS).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_another_version_or_option_starts_anew_and_is_named(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out")
    version = journal.version
    monkeypatch.setattr(
        journal, "version", lambda name: "9.9" if name == "torch" else version(name)
    )
    done = interrupted(recipe, tmp_path / "out")
    assert f"starting anew: torch is 9.9, was {version('torch')}" in done.output
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS, "-j", 2)
    assert "starting anew: threads a worker is 2, was 1" in done.output
    assert done.exit_code == 0


def test_a_project_that_was_moved_goes_on(
    merge: Merge, interrupted: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    models = save_models(project / "models", "llama")
    for model, words in zip(models, ("abcdefgh", "abcdefghijkl", "ghijklmnopqrstu"), strict=True):
        byte_pairs(words).save_pretrained(model)
    named = [f"models/{Path(model).name}" for model in models]
    tokenizer = {"source": "union", "pad_to_multiple_of": 16}
    write_recipe(project / "r.yaml", named, tokenizer=tokenizer)
    monkeypatch.chdir(project)
    interrupted("r.yaml", "out", "--force")
    count = len(records(project))
    assert count >= 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    done = merge("r.yaml", "out", "--workers", 1, *SHARDS, "--force")
    assert done.exit_code == 0, done.output
    assert f"going on: {count} of" in done.output
    assert merge("r.yaml", "plain", *SHARDS, "--force").exit_code == 0
    ours, theirs = rows_by_token(Path("out")), rows_by_token(Path("plain"))
    assert all(torch.equal(ours[token], theirs[token]) for token in ours)


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()], ids=repr
)
@pytest.mark.parametrize("times", [1, 9])
def test_a_plan_that_cannot_be_read_now_loses_nothing(
    error: Exception,
    times: int,
    merge: Merge,
    interrupted: Merge,
    recipe: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(recipe, tmp_path / "out")
    finished = shards(tmp_path)
    read, tries = plan.read, []

    def fail(file: Path) -> list[plan.Shard]:
        tries.append(file)
        if len(tries) <= times:
            raise error
        return read(file)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "read", fail)
        done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    refuses(done, "the plan in", f"cannot be read: {type(error).__name__}", "the same command")
    assert shards(tmp_path) == finished
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert f"going on: {len(finished)} of 12 parts" in done.output
    assert contents(tmp_path / "out") == expected


def test_options_without_effect_go_on(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path
) -> None:
    interrupted(recipe, tmp_path / "out")
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS, "--no-write-model-card", "-v")
    assert "going on" in done.output
    assert "starting anew" not in done.output
    assert not (tmp_path / "out" / "README.md").exists()


def test_two_runs_on_one_folder_are_refused(merge: Merge, recipe: Path, tmp_path: Path) -> None:
    for held in (resumable, unfinished):
        with held(tmp_path / "out"):
            for options in ([], ["--workers", 1]):
                refuses(merge(recipe, tmp_path / "out", *options), "another run is writing")
        shutil.rmtree(tmp_path / ".out.unfinished", ignore_errors=True)


def test_a_merge_without_workers_does_not_remove_what_is_finished(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path
) -> None:
    interrupted(recipe, tmp_path / "out")
    finished = shards(tmp_path)
    refuses(merge(recipe, tmp_path / "out"), "merge with --workers has finished", "remove")
    assert shards(tmp_path) == finished


def test_room_for_what_is_finished_is_not_asked_for_again(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out")
    assert left_bytes(tmp_path / "out") > 4 * 16_000
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 140_000, 140_000)  # the result has 202 KB
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    assert "of an interrupted merge" in done.output


def test_another_folder_is_not_advised_where_it_would_lose_what_is_finished(
    merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advice() -> str:
        done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
        assert "not merged: disk needed" in done.output
        return done.output.partition("-> ")[2].splitlines()[0]

    usage = shutil._ntuple_diskusage(10**6, 10**6, 0)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda place: usage)
        assert advice() == "write to another file system, or delete something there"
    interrupted(recipe, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert advice().startswith("delete something there; another folder would take all of it")


def test_what_a_killed_last_step_has_written_is_not_taken_for_the_result(
    merge: Merge, recipe: Path, expected: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cart_plugin.execution.completion.add_card", killed)
        merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert left(tmp_path) == [".out.unfinished"]
    model = next(tmp_path.glob(".out.unfinished/merge-*/model"))
    assert (model / "config.json").exists()
    (model / "tokenizer.json").write_text("half of")
    assert merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS).exit_code == 0
    assert contents(tmp_path / "out") == expected


# The command, with time to hear a signal before the last tensor is written.
SLOW = """
import signal, time
from cart_plugin.cli import main
from cart_plugin.checkpoints.writing import TensorFile

# Shells start what runs in the background with this signal ignored, the tests among it.
signal.signal(signal.SIGINT, signal.default_int_handler)
write = TensorFile.write

def slowly(self, name, tensor):
    time.sleep(0.1)
    write(self, name, tensor)

TensorFile.write = slowly
main()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-C"])
def test_a_killed_merge_goes_on(
    how: signal.Signals, recipe: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cart_plugin", "merge", str(recipe), str(tmp_path / "out")]
    command += ["--workers", "1", *SHARDS]
    slow = [sys.executable, "-c", SLOW, *command[3:]]
    running = subprocess.Popen(
        slow, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while len(records(tmp_path)) < 2:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.send_signal(how)
    said = running.communicate()[1]
    assert running.returncode == (1 if how is signal.SIGINT else -signal.SIGKILL), said
    finished = shards(tmp_path)
    if how is signal.SIGINT:
        assert f"Error: interrupted; {len(finished)} of 12 parts are finished and kept in" in said
        assert "Traceback" not in said
    assert left(tmp_path) == [".out.unfinished"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "out") == expected
    now = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert now == finished
    assert left(tmp_path) == ["out"]
