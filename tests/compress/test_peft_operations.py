"""What else PEFT does with adapters, by what they hold: docs/adapters.md has the table of this."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from cart_plugin.compress import expand, load_peft
from tests.compress.models import MIXED, answer, load

ROUNDING = 2e-5
WHOLE = {"rank": 4}  # norms, embeddings and the head stored whole
PLAIN = {"rank": 4, "drop_small": True}  # A and B only, of one rank
RANKS = {"energy": 0.7, "drop_small": True}  # A and B only, of any ranks


@pytest.fixture
def full(tmp_path):
    def make(made, task: str):
        place = tmp_path / task
        if not place.exists():
            expand(made.out, task, place)
        return load(place)

    return make


def _near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=ROUNDING)


def _mean(made, full):
    """The base, and the mean of two tasks' differences from it."""
    found = load(made.base)
    one, two = (full(made, task).state_dict() for task in ("one", "two"))
    found.load_state_dict({name: (one[name] + two[name]) / 2 for name in one})
    return found


def _joined(made, kind: str):
    model = load_peft(made.out, "one", "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type=kind)
    model.set_adapter("both")
    return model.eval()


@pytest.mark.parametrize("options", [PLAIN, RANKS])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cat_joins_adapters_of_a_and_b_exactly(kind, options, compressed, full):
    made = compressed(kind, **options)
    _near(answer(_joined(made, "cat")), answer(_mean(made, full)))


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "svd"])
def test_the_other_ways_to_join_are_no_mean_of_the_differences(combination, compressed, full):
    made = compressed("llama", **PLAIN)
    model = load_peft(made.out, "one", "two")
    density = {"density": 1.0} if combination in ("ties", "dare_linear") else {}
    model.add_weighted_adapter(
        ["one", "two"], [0.5, 0.5], "both", combination_type=combination, **density
    )
    model.set_adapter("both")
    error = (answer(model) - answer(_mean(made, full))).abs().max()
    assert error > 1000 * ROUNDING


def test_linear_wants_the_same_ranks_in_all_adapters(compressed):
    with pytest.raises(RuntimeError, match="equal size"):
        _joined(compressed("llama", **RANKS), "linear")


def test_what_linear_makes_of_several_ranks_cannot_be_loaded_again(compressed, tmp_path):
    made = compressed("llama", rank_ratio=0.25, drop_small=True)  # in all adapters the same ones
    _joined(made, "linear").save_pretrained(tmp_path, selected_adapters=["both"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(load(made.base), tmp_path / "both")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_that_store_modules_whole_do_not_join(kind, compressed):
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        _joined(compressed(kind, **WHOLE), "cat")


def test_adapters_of_stacked_experts_do_not_join(compressed):
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        _joined(compressed("qwen3-moe", **PLAIN), "cat")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3-moe"])
def test_plain_adapters_are_swapped_in_place(kind, compressed, full):
    made = compressed(kind, **PLAIN)
    model = PeftModel.from_pretrained(load(made.base), made.adapter("one")).eval()
    hotswap_adapter(model, str(made.adapter("two")), adapter_name="default", torch_device="cpu")
    _near(answer(model), answer(full(made, "two")))


def _swapped(made) -> Tensor:
    model = PeftModel.from_pretrained(load(made.base), made.adapter("one")).eval()
    hotswap_adapter(model, str(made.adapter("two")), adapter_name="default", torch_device="cpu")
    return answer(model)


@pytest.mark.parametrize("options", [PLAIN, {"rank_ratio": 0.25, "layout": "servers"}])
def test_adapters_of_one_rank_are_swapped_in_place(options, compressed, full):
    made = compressed("llama", **options)
    _near(_swapped(made), answer(full(made, "two")))


@pytest.mark.parametrize("options", [RANKS, {"rank_ratio": 0.25, "drop_small": True}])
def test_adapters_of_several_ranks_are_swapped_with_a_wrong_scale(options, compressed, full):
    # PEFT 0.21.2 looks for a layer's rank by its tensors' names, finds none, and takes r for all.
    made = compressed("llama", **options)
    assert (_swapped(made) - answer(full(made, "two"))).abs().max() > 1000 * ROUNDING


def test_what_is_stored_whole_is_not_swapped_in_place(compressed):
    made = compressed("llama", **WHOLE)
    model = PeftModel.from_pretrained(load(made.base), made.adapter("one"))
    with pytest.raises(KeyError):
        hotswap_adapter(model, str(made.adapter("two")), adapter_name="default")


def _mixed(made) -> Tensor:
    inputs = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))  # `answer`'s
    with torch.no_grad():
        return load_peft(made.out, "one", "two")(inputs, adapter_names=["one", "two"]).logits


@pytest.mark.parametrize("options", [PLAIN, RANKS])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_mixes_adapters_of_a_and_b(kind, options, compressed, full):
    made = compressed(kind, **options)
    found = _mixed(made)
    for row, task in enumerate(("one", "two")):
        _near(found[row], answer(full(made, task))[row])


def test_a_batch_mixes_no_norms_and_no_experts(compressed):
    with pytest.raises(TypeError, match="Mixed batching is only supported"):
        _mixed(compressed("llama", **WHOLE))
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        _mixed(compressed("qwen3-moe", **PLAIN))


@pytest.mark.parametrize("options", [WHOLE, PLAIN])
@pytest.mark.parametrize("kind", ["llama", "bert", "qwen3-moe", "vit"])
def test_adapters_are_deleted_and_saved_again(kind, options, compressed, full, tmp_path):
    made = compressed(kind, **options)
    model = load_peft(made.out, "one", "two")
    model.delete_adapter("one")
    model.set_adapter("two")
    wanted = answer(full(made, "two"))
    _near(answer(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(load(made.base), tmp_path / "saved" / "two").eval()
    _near(answer(again), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_merging_is_undone(kind, compressed):
    made = compressed(kind, **WHOLE)
    model = load_peft(made.out, "one")
    before = copy.deepcopy(answer(model))
    model.merge_adapter()
    _near(answer(model), before)
    model.unmerge_adapter()
    _near(answer(model), before)


@pytest.mark.parametrize("kind", ["bert", "glm", "gpt-j", "llama", "qwen2", "swin", "clip"])
def test_the_report_says_where_peft_cannot_merge(kind, compressed, full):
    # Some layers have biases and some have none: PEFT has one switch for all of them.
    made = compressed(kind, **WHOLE)
    told = any("PEFT refuses to merge them" in note for note in made.report.notes)
    assert told == (kind in MIXED)
    model = load_peft(made.out, "two")
    if told:
        with pytest.raises(RuntimeError, match="Impossible to merge"):
            model.merge_and_unload()
    else:
        _near(answer(model.merge_and_unload()), answer(full(made, "two")))
    plain = compressed(kind, **PLAIN)
    assert not any("PEFT refuses to merge them" in note for note in plain.report.notes)
    expand(plain.out, "two", Path(plain.out).parent / f"merged-{kind}")
    merged = answer(load_peft(plain.out, "two").merge_and_unload())
    _near(merged, answer(load(Path(plain.out).parent / f"merged-{kind}")))
