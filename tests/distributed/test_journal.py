"""What a run trusts of what lies there: of runs before it, of other machines, of its own inputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import Result

from benchmarks.architectures.vision_language import tokenizer
from cart_plugin.checkpoints.files import read_json, write_json
from cart_plugin.checkpoints.reading import INDEX
from cart_plugin.distributed import journal, request
from cart_plugin.distributed.here import make
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.part import Workshop
from cart_plugin.distributed.plan import parts, read
from cart_plugin.errors import CartError
from tests.distributed.conftest import SHARDS, contents, left, recipe_of, records
from tests.doctor.tiny import edit_weights, save_models, write_recipe
from tests.execution.test_command import refuses

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


def check_bytes(merge: Merge, recipe: Path, folder: Path) -> None:
    """Assert that `folder/out` is what a merge in one go gives."""
    assert merge(recipe, folder / "whole" / "out", *SHARDS).exit_code == 0
    assert contents(folder / "out") == contents(folder / "whole" / "out")


@pytest.fixture
def places(merge: Merge, interrupted: Merge, recipe: Path, tmp_path: Path) -> Places:
    """Those of a merge into `out` that was interrupted."""
    interrupted(recipe, tmp_path / "out")
    return Places(next(tmp_path.glob(".out.unfinished/merge-*")))


def test_records_without_a_plan_are_not_trusted(
    merge: Merge, places: Places, recipe: Path, tmp_path: Path
) -> None:
    # As a run leaves it that was killed while it removed them. The tokenizer may have been another.
    places.plan.unlink()
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    assert "going on" not in done.output


@pytest.mark.parametrize("name", ["plan.json", "settings.json", "tokenizer.pickle", ""])
def test_half_a_plan_is_none(
    name: str, merge: Merge, places: Places, recipe: Path, tmp_path: Path
) -> None:
    # As a machine leaves it that has lost its power.
    if name in ("tokenizer.pickle", ""):  # of a recipe that asks for one, half or not at all there
        write_json(places.settings, {**read_json(places.settings), "tokenizer": True})
    if name:
        (places.folder / name).write_bytes(b"")
    work = request.Workplace(places.folder.parent, tmp_path / "out", keep=True)
    assert request._left(work) == ""
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    assert "starting anew: the plan of the interrupted merge is broken" in done.output
    assert "going on" not in done.output


def test_records_without_a_plan_are_not_kept(places: Places, tmp_path: Path) -> None:
    places.plan.unlink()
    work = request.Workplace(places.folder.parent, tmp_path / "out", keep=True)
    assert request._left(work) == ""
    assert not work.keep


def test_a_merge_is_removed_under_another_name(
    merge: Merge,
    places: Places,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Workers that outlive their killed run would write into what has the same name again.
    removed: list[str] = []
    remove = shutil.rmtree

    def note(folder: Path, **options: bool) -> None:
        removed.append(Path(folder).name)
        remove(folder, **options)

    leftover = places.folder.with_name("removed-merge-of-old")
    leftover.mkdir()
    monkeypatch.setattr(journal.shutil, "rmtree", note)
    other = recipe_of("linear", saved("llama"), tmp_path)
    assert merge(other, tmp_path / "out", "--workers", 1).exit_code == 0
    assert {f"removed-{places.folder.name}", leftover.name} <= set(removed)
    assert places.folder.name not in removed
    assert left(tmp_path) == ["out"]


def test_files_of_other_programs_are_no_change_of_a_model(merge: Merge, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "llama")
    inputs = request.read_inputs({"merge_method": "cart", "models": [{"model": m} for m in models]})
    before = journal.identity(inputs, "plan", request.MergeOptions(), 1, whole=False)
    (Path(models[0]) / ".nfs000").touch()
    assert journal.identity(inputs, "plan", request.MergeOptions(), 1, whole=False) == before
    (Path(models[0]) / "vocabulary.txt").touch()
    assert journal.identity(inputs, "plan", request.MergeOptions(), 1, whole=False) != before


def test_the_index_of_a_model_is_a_part_of_it(tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "llama")
    for model in models:
        kind = transformers.AutoModelForCausalLM.from_pretrained(model)
        (Path(model) / "model.safetensors").unlink()
        kind.save_pretrained(model, max_shard_size="100KB")
    inputs = request.read_inputs({"merge_method": "cart", "models": [{"model": m} for m in models]})

    def seen() -> list[dict[str, Any]]:
        options = request.MergeOptions()
        return [
            journal.identity(inputs, "plan", options, 1, whole=False),
            journal.surroundings(inputs, models),
        ]

    before = seen()
    with (Path(models[1]) / INDEX).open("a") as index:
        index.write(" ")
    for old, now in zip(before, seen(), strict=True):
        assert journal._difference(old, now) == f"model {models[1]} has changed ({INDEX})"


def test_a_tokenizer_of_none_of_the_models_is_an_input(merge: Merge, tmp_path: Path) -> None:
    *models, other = save_models(tmp_path / "models", "llama")
    recipe = {"merge_method": "linear", "models": [{"model": m} for m in models]}
    for settings in ({"tokenizer_source": other}, {"tokenizer": {"source": other}}):
        inputs = request.read_inputs(recipe | settings)
        before = journal.identity(inputs, "plan", request.MergeOptions(), 1, whole=False)
        (Path(other) / "tokenizer.json").write_text(str(settings))
        now = journal.identity(inputs, "plan", request.MergeOptions(), 1, whole=False)
        assert journal._difference(before, now) == f"model {other} has changed (tokenizer.json)"


@pytest.mark.parametrize("changed", [{"route": "tensorwise"}, {"trust_remote_code": True}])
def test_another_way_to_merge_is_another_merge(
    changed: dict[str, object], saved: Saved, tmp_path: Path
) -> None:
    models = [{"model": model} for model in saved("llama")]
    inputs = request.read_inputs({"merge_method": "cart", "models": models})
    found = []
    for settings in ({}, changed):
        options = request.MergeOptions(**{k: v for k, v in settings.items() if k != "route"})
        route = str(settings.get("route", "plan"))
        found.append(journal.identity(inputs, route, options, 1, whole=False))
    assert found[0] != found[1]


def test_a_model_that_changes_while_it_is_merged(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)

    def trained_meanwhile(*arguments: object) -> None:
        make(*arguments)  # type: ignore[arg-type]
        edit_weights(models[1], lambda held: held["model.norm.weight"].add_(1))

    with monkeypatch.context() as patched:
        patched.setattr("cart_plugin.distributed.here.make", trained_meanwhile)
        done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    refuses(done, f"model {models[1]} has changed (model.safetensors)", "leave the models alone")
    assert left(tmp_path) == [".out.unfinished"]
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert "starting anew: model" in done.output
    check_bytes(merge, recipe, tmp_path)


def like(file: Path, other: Path, place: Path) -> Path:
    """Copy another file, of equal size, so that names and times are those of a file."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    shutil.copy(other, place)
    os.utime(place, ns=times)
    return place


@pytest.mark.parametrize("moment", ["between the checks", "while it is planned"])
def test_a_model_that_is_replaced_at_the_start(
    moment: str, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    weights, aside = Path(models[1]) / "model.safetensors", tmp_path / "aside"
    other = like(weights, Path(models[2]) / "model.safetensors", tmp_path / "other.safetensors")
    name = "check_surroundings" if moment == "between the checks" else "surroundings"
    whole, seen = getattr(journal, name), []

    def exchanged(*arguments: object) -> object:
        found = whole(*arguments) if moment == "between the checks" else None
        if not seen:
            weights.rename(aside)
            other.rename(weights)
        seen.append(found)
        return found if moment == "between the checks" else whole(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(journal, name, exchanged)
        done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    refuses(done, f"model {models[1]} has changed (model.safetensors)")
    weights.rename(other)
    aside.rename(weights)
    assert merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS).exit_code == 0
    check_bytes(merge, recipe, tmp_path)


def test_what_is_no_part_of_the_result_may_change(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs of a training that goes on beside, and a file that is written anew as it was."""
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    weights, make_part = Path(models[1]) / "model.safetensors", Workshop.make

    def beside(workshop: Workshop, number: int) -> None:
        with (Path(models[0]) / "trainer_log.jsonl").open("a") as log:
            log.write(f"{number}\n")
        (Path(models[1]) / "README.md").write_text(str(number))
        if number == 3:
            like(weights, weights, tmp_path / "anew").rename(weights)
        make_part(workshop, number)

    monkeypatch.setattr(Workshop, "make", beside)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    assert "trainer_log.jsonl" not in contents(tmp_path / "out")


def test_parts_of_a_model_that_took_another_ones_place_are_not_kept(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it is there, nor when the first one is back."""
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    weights, aside = Path(models[1]) / "model.safetensors", tmp_path / "aside"
    other = like(weights, Path(models[2]) / "model.safetensors", tmp_path / "other.safetensors")
    make_part, made = Workshop.make, []

    def exchanged(workshop: Workshop, number: int) -> None:
        made.append(number)
        if len(made) == 3:
            weights.rename(aside)
            other.rename(weights)
        make_part(workshop, number)

    with monkeypatch.context() as patched:
        patched.setattr(Workshop, "make", exchanged)
        done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    refuses(
        done,
        f"model {models[1]} has changed (model.safetensors)",
        "2 of 12 parts are finished and kept",
    )
    weights.rename(other)
    aside.rename(weights)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert "going on: 2 of 12 parts" in done.output
    check_bytes(merge, recipe, tmp_path)


def test_another_model_of_equal_names_sizes_and_times_is_another(
    merge: Merge, interrupted: Callable[..., Result], tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    interrupted(recipe, tmp_path / "out")
    weights = Path(models[1]) / "model.safetensors"
    like(weights, Path(models[2]) / "model.safetensors", weights)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert f"starting anew: model {models[1]} has changed (model.safetensors)" in done.output
    check_bytes(merge, recipe, tmp_path)


def test_a_tokenizer_that_goes_while_the_model_is_merged(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_models(tmp_path / "models", "llama")
    tokenizer({}).save_pretrained(models[0])
    recipe = write_recipe(tmp_path / "r.yaml", models)

    def removed_meanwhile(*arguments: object) -> None:
        make(*arguments)  # type: ignore[arg-type]
        (Path(models[0]) / "tokenizer.json").unlink()

    monkeypatch.setattr("cart_plugin.distributed.here.make", removed_meanwhile)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    refuses(done, f"model {models[0]} has changed (tokenizer.json is gone) while it was merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["a byte", "two names", "zeros"])
def test_headers_are_what_they_were(
    how: str, merge: Merge, interrupted: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    """Digests of the data do not tell which tensor is where."""
    interrupted(recipe, tmp_path / "out")
    model = records(tmp_path)[0].parent.parent / "model"
    shard = next(file for file in sorted(model.iterdir()) if b"k_proj" in file.read_bytes())
    content = shard.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    head = content[:length]
    if how == "a byte":
        head = head.replace(b'"pt"', b'"qt"')
    elif how == "two names":
        names = (b"k_proj", b"v_proj", b"q_proj", b"o_proj", b"gate_proj", b"up_proj")
        first, second = [name for name in names if name in head][:2]
        head = head.replace(first, b"\0").replace(second, first).replace(b"\0", second)
    else:
        head = bytes(length)
    assert head != content[:length]
    shard.write_bytes(head + content[length:])
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    check_bytes(merge, recipe, tmp_path)


def test_a_machine_with_other_versions_or_models_makes_nothing(places: Places) -> None:
    planned = read_json(places.settings)
    whole = parts(read(places.plan))
    for changed, said in (
        ({"torch": "1.0"}, "torch is .*, was 1.0"),
        ({key: [] for key in planned["surroundings"] if "model" in key}, "has changed"),
    ):
        write_json(places.settings, {**planned, "surroundings": planned["surroundings"] | changed})
        before = {path: path.stat().st_mtime_ns for path in places.model.iterdir()}
        with pytest.raises(CartError, match=f"does not find what .* planned for: .*{said}"):
            make(places, whole)
        assert {path: path.stat().st_mtime_ns for path in places.model.iterdir()} == before


def test_a_record_that_is_not_to_be_seen_ends_the_merge(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it nobody would know of a NaN in the part.
    monkeypatch.setattr(journal, "_PATIENCE", 0.0)
    whole = parts(read(places.plan))
    with pytest.raises(CartError, match="is not to be seen here"):
        journal.records(places, whole)
    finished = [part for part in whole if places.record(part).is_file()]
    assert len(journal.records(places, finished)) == len(finished)


def test_a_record_that_is_seen_late_is_waited_for(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = next(part for part in parts(read(places.plan)) if not places.record(part).is_file())
    monkeypatch.setattr(journal.time, "sleep", lambda _: write_json(places.record(part), {"a": 1}))
    assert journal.records(places, [part]) == [{"a": 1}]


def test_options_that_change_no_tensor_are_those_of_the_latest_run(
    merge: Merge,
    full_disk: Callable[[int], dict[str, int]],
    places: Places,
    recipe: Path,
    tmp_path: Path,
) -> None:
    assert read_json(places.job)["options"]["lazy_unpickle"] is False
    full_disk(16)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS, "--lazy-unpickle")
    assert "going on" in done.output
    assert read_json(places.job)["options"]["lazy_unpickle"] is True


def test_what_mergekit_logs_is_shown_where_it_is_asked_for(
    merge: Merge, recipe: Path, tmp_path: Path
) -> None:
    quiet = merge(recipe, tmp_path / "a", "--workers", 1)
    loud = merge(recipe, tmp_path / "b", "--workers", 1, "-v")
    assert "Planning operations" not in quiet.output
    assert loud.output.count("Planning operations") > 0
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b")


def test_a_failed_merge_shows_what_mergekit_logged(
    merge: Merge, full_disk: Callable[[int], dict[str, int]], recipe: Path, tmp_path: Path
) -> None:
    full_disk(1)
    done = merge(recipe, tmp_path / "out", "--workers", 1, "-v")
    assert "Planning operations" in done.output
    refuses(done, "the disk is full")
    assert records(tmp_path) == []
