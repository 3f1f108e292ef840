"""Splits: nothing that looks alike is torn apart, and the same seed gives the same split."""

import numpy as np
import pytest

from benchmarks.common.splits import assign_groups, balanced_order, merge_groups
from benchmarks.vision.splits import Split, check_no_leak


def split_of(images, groups):
    images = np.asarray(images, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Split(images, np.zeros(len(images), dtype=np.int64), np.asarray(groups))


def test_every_split_gets_its_share_of_whole_groups():
    sizes = np.full(100, 3)
    assigned = assign_groups(sizes, test=0.2, validation=0.15, rng=np.random.default_rng(0))
    assert np.bincount(assigned).tolist() == [65, 15, 20]


def test_the_same_seed_gives_the_same_groups_and_another_seed_others():
    sizes = np.arange(1, 30)
    draws = [
        assign_groups(sizes, test=0.2, validation=0.2, rng=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()


def test_a_group_with_most_members_is_for_training():
    sizes = [100, 1, 1, 1, 1, 1]
    for seed in range(20):
        assigned = assign_groups(sizes, test=0.01, validation=0.01, rng=np.random.default_rng(seed))
        assert assigned[0] == 0
        assert np.bincount(assigned).tolist() == [2, 2, 2]


@pytest.mark.parametrize("sizes", [[5, 5, 5], [100, 1, 1]])
def test_too_few_groups_are_refused(sizes):
    with pytest.raises(ValueError, match="too few for three splits"):
        assign_groups(sizes, test=0.2, validation=0.2, rng=np.random.default_rng(0))


def test_groups_merge_along_chains():
    assert merge_groups(5, [(0, 3), (3, 4)]).tolist() == [0, 1, 2, 0, 0]


def test_every_prefix_of_a_balanced_order_is_balanced():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    order = balanced_order(labels, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(100))
    for length in (3, 9, 30, 60):
        counts = np.bincount(labels[order[:length]], minlength=3)
        assert counts.tolist() == [length // 3] * 3


def test_a_group_in_two_splits_is_a_leak():
    splits = {"train": split_of([1, 2], [0, 1]), "test": split_of([3, 4], [1, 2])}
    with pytest.raises(ValueError, match="1 groups are in both train and test"):
        check_no_leak(splits)


def test_an_image_in_two_splits_is_a_leak():
    splits = {"validation": split_of([1, 2], [0, 1]), "test": split_of([2, 4], [2, 3])}
    with pytest.raises(ValueError, match="1 identical images are in both validation and test"):
        check_no_leak(splits)


def test_disjoint_splits_pass():
    check_no_leak({"train": split_of([1, 2], [0, 1]), "test": split_of([3, 4], [2, 3])})
