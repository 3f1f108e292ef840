"""A cache of its own for every test, and a suite with one tiny task and a tiny encoder."""

import pytest

from benchmarks.vision import backbone, finetune, tasks
from tests.benchmarks.synthetic import BLOCKS, tiny_encoder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_suite(cache, monkeypatch):
    """The task `blocks` and a tiny pretrained encoder; nothing is fetched. Returns its folder."""
    folder = cache / "encoders" / "pretrained-tiny"
    folder.mkdir(parents=True)
    backbone.save_encoder(tiny_encoder(), folder)
    monkeypatch.setattr(finetune, "prepare_backbone", lambda: folder)
    monkeypatch.setitem(tasks.TASKS, "blocks", BLOCKS)
    return folder
