"""Which options go together, and what is shown meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console

from cart_plugin.cli import console
from cart_plugin.distributed import here, plan, progress
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.plan import Part
from cart_plugin.distributed.progress import State, Step
from tests.distributed.conftest import left, recipe_of
from tests.doctor.tiny import save_models, write_recipe
from tests.execution.test_command import refuses
from tests.mergekit.helpers import pickle

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", 1, "--multi-gpu"], "--gpus 1 gives each worker a GPU"),
        (["--workers", 1, "--no-safe-serialization"], "the result is safetensors"),
        (["--workers", 1, "--gpus", 2], "share of one GPU"),
        (["--workers", 2, "--device", "cuda"], "pass --gpus 1"),
        (["--gpus", 1], "mergekit's own option is --cuda"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: list[object], said: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    refuses(merge(recipe, tmp_path / "out", *options), said)
    assert left(tmp_path) == []


def test_a_gpu_is_not_asked_for_where_there_is_none(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    refuses(merge(recipe, tmp_path / "out", "--workers", 1, "--gpus", 1), "finds no GPU")


def test_a_gpu_and_another_device_are_refused(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--workers", 2, "--gpus", 1, "--device", "cuda:1")
    refuses(done, "--gpus and --device cuda:1 are two devices")


@pytest.mark.parametrize(("workers", "threads", "told"), [(2, 1, False), (2, 2, True)])
def test_more_threads_than_cores_are_told(
    workers: int,
    threads: int,
    told: bool,
    merge: Merge,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cart_plugin.distributed.request.cores", lambda: 2)
    monkeypatch.setattr("cart_plugin.distributed.on_ray.make", here_instead)
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--workers", workers, "-j", threads)
    assert done.exit_code == 0, done.output
    assert ("note: 4 threads of the workers share 2 cores" in done.output) is told


def here_instead(places: Places, parts: list[Part], *_: object) -> None:
    here.make(places, parts)


def test_without_ray_several_workers_are_refused_before_the_work(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("cart_plugin.execution.merge.prepare", None)
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--workers", 2)
    refuses(done, "pip install 'cart-plugin[ray]'")


def test_no_workers_are_refused(merge: Merge, tmp_path: Path) -> None:
    assert merge(tmp_path / "r.yaml", tmp_path / "out", "--workers", 0).exit_code == 2


def test_a_cluster_that_is_not_there_is_one_line(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    recipe = recipe_of("linear", saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--ray", "auto")
    refuses(done, "cannot join the Ray cluster at auto", "Could not find any running Ray")
    assert left(tmp_path) == []


def test_memory_is_asked_for_the_files_of_pickled_models(
    interrupted: Merge, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")
    files = [Path(pickle(model)) / "pytorch_model.bin" for model in models[:2]]
    recipe = write_recipe(tmp_path / "r.yaml", models)
    asked = []
    for number, options in enumerate(([], ["--lazy-unpickle"])):
        interrupted(recipe, tmp_path / str(number) / "out", *options)
        (file,) = tmp_path.glob(f"{number}/.out.unfinished/merge-*/plan.json")
        asked.append([part.memory for part in plan.parts(plan.read(file))])
    whole = sum(file.stat().st_size for file in files)  # each is loaded at once
    assert [more - less for more, less in zip(*asked, strict=True)] == [whole] * len(asked[0])


def test_progress_is_the_sum_over_all_parts(tmp_path: Path) -> None:
    first, second = Step(tmp_path, 0), Step(tmp_path, 1)
    first.skip(tensors=3, count=100)
    second.read(50)
    second.wrote(20)
    second.done(1)
    second.start("layer.weight", peak=10**9)
    assert progress.total(tmp_path, range(3)) == State(tensors=4, read=50, written=20, found=100)
    assert progress.in_hand(tmp_path, 1) == "layer.weight"
    assert progress.in_hand(tmp_path, 2) == ""


def test_a_log_has_a_line_a_minute_with_rates_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    printed = StringIO()
    terminal = Console(file=printed, width=200)
    with console.transfers(terminal) as shown:
        for seconds in range(0, 121, 30):
            now = 1000.0 + seconds
            shown.show(State(seconds, 4_000_000 * seconds, 10**6 * seconds, 0), 1200, 10**9)
    first, second = printed.getvalue().splitlines()
    assert second == "120 of 1,200 tensors, reads 4 MB/s, writes 1 MB/s, 0:14:40 left"
    assert first.startswith("60 of 1,200 tensors")


def test_quiet_leaves_notes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    for is_terminal in (False, True):
        printed = StringIO()
        terminal = Console(file=printed, width=200, force_terminal=is_terminal)
        with console.transfers(terminal, quiet=True) as shown:
            shown.note("going on")
            now += 100
            shown.show(State(1, 1, 1, 0), 1200, 10**9)
        assert "going on" in printed.getvalue()
        assert "1,200 tensors" not in printed.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = StringIO()
    terminal = Console(file=printed, width=120, force_terminal=True)
    with console.transfers(terminal) as shown:
        shown.tell("planning")
        shown.show(State(tensors=3, read=10, written=10, found=100), 48, 1000)
    assert "3 of 48 tensors" in printed.getvalue()
