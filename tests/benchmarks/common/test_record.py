"""What tells whether measured figures still hold, and where they come from."""

import json
from pathlib import Path

import pytest

from benchmarks.common import provenance as source
from benchmarks.common import record
from benchmarks.common.measure import RESULTS
from benchmarks.common.record import COMPRESSES, MERGES, MERGES_ADAPTERS, Record, conditions
from cart_plugin import linalg, merging

FIRST = {"cart_plugin": "0.1.0", "commit": "aaa", "date": "2026-01-01"}
SECOND = {"cart_plugin": "0.1.0", "commit": "bbb", "date": "2026-01-02"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


def current() -> dict:
    return conditions(MERGES, ("torch",), examples=3)


def at(monkeypatch: pytest.MonkeyPatch, sitting: dict) -> None:
    monkeypatch.setattr(record, "provenance", lambda: sitting)


def test_a_record_goes_on_where_it_was(file: Path) -> None:
    Record(file, current()).put("a", 1)
    again = Record(file, current())
    assert again.cases == {"a": 1}
    assert again.discarded is None


@pytest.mark.parametrize("room", [linalg, merging])
def test_a_raised_revision_voids_a_record(
    file: Path, monkeypatch: pytest.MonkeyPatch, room: object
) -> None:
    Record(file, current()).put("a", 1)
    monkeypatch.setattr(room, "REVISION", 99)
    again = Record(file, current())
    assert again.cases == {}
    assert again.discarded == "measured under other conditions: revisions"


def test_a_room_that_takes_no_part_does_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Record(file, conditions(("linalg",), ())).put("a", 1)
    monkeypatch.setattr(merging, "REVISION", 99)
    assert Record(file, conditions(("linalg",), ())).cases == {"a": 1}


def test_a_raised_revision_spares_what_the_plugin_does_not_decide(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Record(file, current())
    older.put("method=cart", 1)
    older.put("method=ties", 2)
    monkeypatch.setattr(linalg, "REVISION", 99)
    again = Record(file, current(), spared={"revisions": lambda key: key != "method=cart"})
    assert again.cases == {"method=ties": 2}
    assert again.discarded
    other = Record(file, current() | {"examples": 4}, spared={"revisions": lambda _: True})
    assert other.cases == {}


def test_settings_that_are_new_or_gone_void_a_record(file: Path) -> None:
    Record(file, current()).put("a", 1)
    assert Record(file, current() | {"more": 1}).cases == {}
    less = current()
    del less["examples"]
    assert Record(file, less).cases == {}


def test_only_what_is_timed_depends_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert conditions(MERGES, ())["environment"]["OMP_NUM_THREADS"] == "7"
    assert "environment" not in conditions(MERGES, (), timed=False)


def test_cases_of_several_commits_are_told_apart(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, FIRST)
    older = Record(file, current())
    for key in ("kept", "redone", "longer"):
        older.put(key, [1])
    at(monkeypatch, SECOND)
    again = Record(file, current())
    again.put("redone", [2])
    again.put("longer", [1, 2], adds=True)
    assert json.loads(file.read_text())["measured"] == [
        FIRST | {"cases": ["kept", "longer"]},
        SECOND | {"cases": ["redone", "longer"]},
    ]
    again.drop(["kept", "longer"])
    assert again.measured == [SECOND | {"cases": ["redone"]}]


def test_a_caption_names_each_commit_once() -> None:
    made = source.made_by("bench-x", [SECOND, FIRST, FIRST | {"cases": ["a"]}], "on 2 cores")
    assert made == (
        "Made by `make bench-x` on 2 cores (cart-plugin 0.1.0, commit aaa, 2026-01-01; "
        "cart-plugin 0.1.0, commit bbb, 2026-01-02)."
    )
    older = {"cart_plugin": "0.1.0", "recorded_by": "ccc", "date": "2026-01-01"}
    assert "recorded in commits ccc, ddd" in source.made_by(
        "bench-x", [older, older | {"recorded_by": "ddd"}]
    )


def test_a_folder_outside_git_has_no_commit(tmp_path: Path) -> None:
    assert source.commit(tmp_path) is None


def test_changed_files_but_not_results_make_a_commit_dirty(tmp_path: Path) -> None:
    import subprocess

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    results = tmp_path / RESULTS.relative_to(source.ROOT)
    results.mkdir(parents=True)
    for path in (tmp_path / "code.py", results / "table.md"):
        path.write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    clean = source.commit(tmp_path)
    assert clean
    (results / "table.md").write_text("2")
    assert source.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert source.commit(tmp_path) == f"{clean}-dirty"
    assert source.commit(results) is None  # not the repository's own folder


def test_every_kept_result_says_where_it_comes_from() -> None:
    for path in RESULTS.rglob("*.json"):
        measured = json.loads(path.read_text())["measured"]
        assert measured, path
        for one in measured:
            assert {"cart_plugin", "date"} < set(one), path
            assert "commit" in one or "recorded_by" in one, path


def test_kept_records_say_which_revisions_decide_them_and_tell_all_cases() -> None:
    records = [
        (path, content)
        for path in RESULTS.rglob("*.json")
        if isinstance((content := json.loads(path.read_text())).get("cases"), dict)
    ]
    assert len(records) > 20
    for path, content in records:
        assert set(content["conditions"]["revisions"]) <= {
            *MERGES,
            *MERGES_ADAPTERS,
            *COMPRESSES,
        }, path
        told = {key for one in content["measured"] for key in one["cases"]}
        assert told == set(content["cases"]), path
