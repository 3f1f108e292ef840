"""Prepared tasks: complete, repeatable, made once, with messages that help."""

import numpy as np
import pytest

from benchmarks.common.cache import read_manifest
from benchmarks.vision import tasks
from tests.benchmarks.synthetic import BLOCKS, blocks


def test_a_prepared_task_has_three_splits_and_says_what_it_is(tiny_suite):
    folder = tasks.prepare_task("blocks")
    counts = read_manifest(folder)["counts"]
    assert {name: count["images"] for name, count in counts.items()} == {
        "train": 24,
        "validation": 12,
        "test": 20,
    }
    assert tasks.load_split("blocks", "test").images.shape == (20, 56, 56, 3)


def test_a_prepared_task_is_not_made_again(tiny_suite, monkeypatch):
    folder = tasks.prepare_task("blocks")
    monkeypatch.setitem(tasks.TASKS, "blocks", tasks.Task("Blocks", 2, (), None, "image"))
    assert tasks.prepare_task("blocks") == folder


def test_a_preparation_that_fails_leaves_nothing_that_looks_finished(tiny_suite, monkeypatch):
    def build(folders, rng):
        both = blocks(6, rng, 0)
        return {"train": both, "validation": blocks(6, rng, 50), "test": both}

    monkeypatch.setitem(tasks.TASKS, "blocks", tasks.Task("Blocks", 2, (), build, "image"))
    with pytest.raises(ValueError, match="6 groups are in both train and test"):
        tasks.prepare_task("blocks")
    assert read_manifest(tasks.task_folder("blocks")) is None


def test_preparing_twice_gives_the_same_images(tiny_suite, monkeypatch, tmp_path):
    tasks.prepare_task("blocks")
    first = tasks.load_split("blocks", "train")
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "other"))
    tasks.prepare_task("blocks")
    again = tasks.load_split("blocks", "train")
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.labels, again.labels)


def test_training_samples_are_balanced_and_differ_by_seed(tiny_suite):
    tasks.prepare_task("blocks")
    samples = [tasks.training_sample("blocks", 10, seed) for seed in (0, 0, 1)]
    assert [np.bincount(sample.labels).tolist() for sample in samples] == [[5, 5]] * 3
    assert samples[0].groups.tolist() == samples[1].groups.tolist() != samples[2].groups.tolist()


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown task 'mnits'; the tasks are mnist, "):
        tasks.prepare_task("mnits")


def test_an_unknown_split_is_refused(tiny_suite):
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tasks.load_split("blocks", "dev")


def test_a_task_that_is_not_prepared_says_how_to(tiny_suite):
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.vision\.prepare --tasks blocks"):
        tasks.load_split("blocks", "test")


def test_every_task_of_the_table_is_complete():
    assert len(tasks.TASKS) >= 20
    for name, entry in tasks.TASKS.items():
        assert name.isidentifier()
        assert entry.classes >= 5
        assert entry.sources
        for source in entry.sources:  # what registries keep is pinned
            assert source.kind == "apt" or (source.version and len(source.sha256) == 64)
    assert BLOCKS.sources == ()


def test_no_letter_is_two_classes_of_its_script():
    for name, entry in tasks.TASKS.items():
        if entry.unit == "font family":
            (letters,) = entry.build.args
            assert len(set(letters)) == entry.classes, name
