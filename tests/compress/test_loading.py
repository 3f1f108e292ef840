"""An adapter and the base that it was made around belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)

from cart_plugin import CartError
from cart_plugin.checkpoints.digests import digest
from cart_plugin.compress import compress, expand, load_peft
from cart_plugin.compress.inputs import open_model
from tests.compress.models import TASKS, answer, load, new_model, tensors
from tests.compress.refused import change

ROUNDING = 2e-5


@pytest.fixture
def moved(models, tmp_path) -> Path:
    """A compressed folder that lies elsewhere now, and another compression in its old place."""
    compress(models, tmp_path / "out", rank=4)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    for number, folder in enumerate(models):
        change(folder, "model.norm.weight", lambda tensor, by=number: tensor + 1 + by)
    compress(models, tmp_path / "out", rank=4)
    return tmp_path / "moved"


def test_adapters_load_from_where_they_lie(moved, tmp_path):
    model = load_peft(moved)
    assert list(model.peft_config) == list(TASKS)
    for task in TASKS:
        expand(moved, task, tmp_path / task / "full")
        model.set_adapter(task)
        full = answer(load(tmp_path / task / "full"))
        torch.testing.assert_close(answer(model), full, atol=ROUNDING, rtol=ROUNDING)


def test_the_first_named_adapter_is_active(moved):
    model = load_peft(moved, "three", "one", dtype=torch.bfloat16)
    assert list(model.peft_config) == ["three", "one"]
    assert model.active_adapter == "three"
    assert model.dtype == torch.bfloat16


def test_another_base_in_the_old_place_is_refused(moved, tmp_path):
    with pytest.raises(CartError, match="adapter one was made around other weights than those in"):
        load_peft(moved, base=tmp_path / "out" / "base")
    shutil.rmtree(moved / "base")
    shutil.copytree(tmp_path / "out" / "base", moved / "base")
    for use in (load_peft, lambda folder: expand(folder, "one", tmp_path / "full")):
        with pytest.raises(CartError, match="made around other weights"):
            use(moved)
    assert not (tmp_path / "full").exists()


def test_a_copy_of_the_base_will_do_in_other_shards(moved, tmp_path):
    load(moved / "base").save_pretrained(tmp_path / "copy", max_shard_size="10KB")
    copied = load_peft(moved, "two", base=tmp_path / "copy")
    torch.testing.assert_close(answer(copied), answer(load_peft(moved, "two")), rtol=0, atol=0)


def test_an_adapter_without_its_record_is_refused(moved):
    (moved / "adapters" / "one" / "base.json").unlink()
    with pytest.raises(CartError, match=r"adapter one has no base\.json"):
        load_peft(moved, "one")


def test_an_unknown_adapter_is_refused(moved):
    with pytest.raises(CartError, match="has no task 'four'; it has one, two, three"):
        load_peft(moved, "four")


def test_a_digest_tells_values_shapes_and_names_apart(models, tmp_path):
    found = {digest(open_model(folder, folder.name)) for folder in models}
    assert len(found) == len(models)
    again = Path(shutil.copytree(models[0], tmp_path / "again"))
    assert digest(open_model(again, "")) == digest(open_model(models[0], ""))
    change(again, "model.norm.weight", lambda tensor: tensor.reshape(1, -1))
    assert digest(open_model(again, "")) != digest(open_model(models[0], ""))


def test_a_digest_looks_at_both_ends_of_a_large_tensor(tmp_path):
    model = new_model("llama", num_hidden_layers=1, vocab_size=2**13)
    table = model.model.embed_tokens.weight.data
    found = set()
    for change_at in (None, (0, 0), (-1, -1)):
        if change_at is not None:
            table[change_at] += 1
        model.save_pretrained(tmp_path / "model")
        found.add(digest(open_model(tmp_path / "model", "")))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("llama", AutoPeftModelForCausalLM),
        ("bert", AutoPeftModelForSequenceClassification),
        ("roberta", AutoPeftModelForSequenceClassification),
        ("tagger", AutoPeftModelForTokenClassification),
        ("vit", AutoPeftModel),
    ],
)
def test_pefts_automatic_classes_load_adapters(kind, auto, compressed):
    made = compressed(kind, rank=4)
    found = answer(auto.from_pretrained(made.adapter("two")).eval())
    torch.testing.assert_close(found, answer(load_peft(made.out, "two")), atol=1e-6, rtol=1e-6)
    stored, own = tensors(made.adapter("two")), tensors(made.models[1])
    head = [name for name in own if name.startswith("classifier.")]
    assert bool(head) == (kind != "llama")
    assert all(torch.equal(stored[f"base_model.model.{name}"], own[name]) for name in head)


def test_a_classifiers_adapter_without_a_head_loads_by_the_plain_class(compressed):
    made = compressed("bert", rank=4, drop_small=True)
    found = answer(AutoPeftModel.from_pretrained(made.adapter("two")).eval())
    torch.testing.assert_close(found, answer(load_peft(made.out, "two")), atol=1e-6, rtol=1e-6)
    with pytest.raises(KeyError, match="classifier"):  # PEFT 0.21 wants a head of the adapter's own
        AutoPeftModelForSequenceClassification.from_pretrained(made.adapter("two"))
