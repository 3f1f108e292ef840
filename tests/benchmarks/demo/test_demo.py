"""The demo's recipes, its check for lost tensors, and its table; mergekit on tiny models."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from benchmarks.common import recipes
from benchmarks.common.recipes import Candidate, MergeError, check_whole, merge
from benchmarks.demo import report
from benchmarks.demo import run as demo
from benchmarks.vision import backbone
from tests.benchmarks.synthetic import tiny_encoder


@pytest.fixture
def encoders(tmp_path):
    """A pretrained encoder and three others, as folders."""
    folders = [tmp_path / name for name in ("base", "one", "two", "three")]
    for seed, folder in enumerate(folders):
        backbone.save_encoder(tiny_encoder(seed), folder)
    return folders


def rewrite(folder, change):
    """Save a folder's weights after `change`."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_every_method_of_the_demo_has_a_recipe_with_absolute_paths(tmp_path):
    methods = {candidate.method for candidate in demo.CANDIDATES}
    assert methods == {"linear", "task_arithmetic", "ties", "dare_ties", "cart", "cart_auto"}
    for candidate in demo.CANDIDATES:
        recipe = candidate.recipe([tmp_path / "one", tmp_path / "two"], tmp_path / "base")
        assert recipe["merge_method"] == candidate.method
        assert all(os.path.isabs(entry["model"]) for entry in recipe["models"])
        assert recipe.get("base_model") == (
            str(tmp_path / "base") if candidate.needs_base else None
        )


def test_a_whole_merge_passes(encoders):
    _, *tuned = encoders
    assert check_whole(tuned, tuned[0]) == len(load_file(tuned[0] / "model.safetensors"))


def test_a_merge_that_lost_tensors_fails(encoders):
    _, *tuned = encoders
    merged = tuned[0].with_name("merged")
    shutil.copytree(tuned[0], merged)
    rewrite(merged, lambda state: {name: t for name, t in state.items() if "q_proj" not in name})
    with pytest.raises(MergeError, match=r"lacks 4 of the \d+ tensors .*q_proj"):
        check_whole(tuned, merged)


def test_a_tensor_that_one_input_lacks_need_not_be_in_the_merge(encoders):
    _, *tuned = encoders
    rewrite(tuned[1], lambda state: {k: t for k, t in state.items() if k != "layernorm.bias"})
    assert check_whole(tuned, tuned[1]) == len(load_file(tuned[1] / "model.safetensors"))


def test_a_merge_that_changed_a_shape_fails(encoders):
    _, *tuned = encoders
    merged = tuned[0].with_name("merged")
    shutil.copytree(tuned[0], merged)
    rewrite(merged, lambda state: state | {"layernorm.bias": torch.zeros(3)})
    with pytest.raises(MergeError, match="1 merged tensors changed their shape"):
        check_whole(tuned, merged)


def test_mergekit_averages_and_the_second_time_the_cache_answers(cache, encoders, monkeypatch):
    base, *tuned = encoders
    average = Candidate("linear", "average", model_parameters={"weight": 1.0}, needs_base=False)
    first = merge(average, tuned, base)
    states = [load_file(folder / "model.safetensors") for folder in tuned]
    merged = load_file(first.folder / "model.safetensors")
    assert first.tensors == len(states[0]) == len(merged)
    for name, value in merged.items():
        expected = sum(state[name] for state in states) / 3
        assert torch.allclose(value, expected, atol=1e-6)
    monkeypatch.setattr(recipes, "run_mergekit", None)
    assert merge(average, tuned, base) == first


def test_a_failing_mergekit_is_told_in_one_line(cache, encoders):
    base, *tuned = encoders
    unknown = Candidate("no_such_method", "")
    with pytest.raises(MergeError, match=r"mergekit-yaml failed: .*no_such_method") as caught:
        merge(unknown, tuned, base)
    assert "\n" not in str(caught.value)
    assert [path for path in (cache / "merges").iterdir() if path.is_dir()] == []


@pytest.fixture
def result():
    """A result with two tasks."""

    def row(method, first, second, merged=True):
        test = {"a": first, "b": second}
        mean = (first + second) / 2
        extra = {"seconds": 2.0, "peak_mb": 700.0} if merged else {"seconds": None, "peak_mb": None}
        return {"method": method, "setting": "x", "test": test, "mean": mean, "share": mean} | extra

    rows = [row("pretrained", 0.1, 0.2, False), row("fine-tuned", 1.0, 1.0, False)]
    rows += [row("linear", 0.4, 0.5), row("cart", 0.6, 0.7)]
    counts = {"validation": 3, "test": 5}
    return {"tasks": {"a": "Task A", "b": "Task B"}, "rows": rows, "counts": counts}


def test_the_markdown_table_has_a_row_a_method_and_marks_the_best(result):
    lines = [line for line in report.markdown(result).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert lines[0].startswith("| method | Task A | Task B | mean | of fine-tuned |")
    assert lines[-1].startswith("| **cart** | **60.0** | **70.0** | **65.0** | **65 %** |")
    assert {line.count("|") for line in lines} == {9}


def test_the_plot_is_written(result, tmp_path):
    report.save_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_demo_on_a_tiny_suite(tiny_suite, monkeypatch, tmp_path):
    pytest.importorskip("cart_plugin.mergekit")
    from benchmarks.vision import tasks
    from tests.benchmarks.synthetic import BLOCKS

    names = ["blocks", "more", "most"]
    for name in names[1:]:
        monkeypatch.setitem(tasks.TASKS, name, BLOCKS)
    monkeypatch.setattr(backbone, "prepare_backbone", lambda: tiny_suite)
    out = tmp_path / "out"
    arguments = ["--tasks", ",".join(names), "--out", str(out), "--workers", "0"]
    outcome = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    saved = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in saved["rows"]] == [
        *("pretrained", "fine-tuned", "linear", "task_arithmetic", "ties", "dare_ties", "cart"),
        "cart_auto",
    ]
    assert len(saved["grid"]) == len(demo.CANDIDATES)
    assert str(tmp_path) not in (out / "results.json").read_text()


def test_an_unknown_task_ends_with_one_line(cache, monkeypatch, tiny_suite):
    monkeypatch.setattr(backbone, "prepare_backbone", lambda: tiny_suite)
    outcome = CliRunner().invoke(demo.main, ["--tasks", "mnits"])
    assert outcome.exit_code == 1
    assert "Error: unknown task 'mnits'; the tasks are mnist" in outcome.output
