"""The demo's recipes, its check for lost tensors, and its table; mergekit on tiny models."""

import io
import json
import os
import re
import shutil

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.common import recipes
from benchmarks.common.cache import MANIFEST, write_json
from benchmarks.common.recipes import Candidate, MergeError, check_whole, merge
from benchmarks.demo import evaluator, report, work
from benchmarks.demo import run as demo
from benchmarks.demo.evaluator import Evaluator
from benchmarks.demo.stages import Stages
from benchmarks.vision import backbone, finetune, tasks
from benchmarks.vision.finetune import FineTuning
from benchmarks.vision.tasks import prepare_task
from tests.benchmarks.synthetic import tiny_encoder

QUICK = FineTuning(images=24, epochs=2, batch=8, warmup=4)


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


@pytest.mark.slow
def test_mergekit_in_this_process_merges_as_the_command_does(cache, encoders):
    base, *tuned = encoders
    dare = Candidate("dare_ties", "", {"lambda": 0.5}, {"weight": 1.0, "density": 0.5})
    command, here = (merge(dare, tuned, base, fresh=True, here=here) for here in (False, True))
    assert command == here  # one place in the cache: the second has replaced the first
    here = (here.folder / "model.safetensors").read_bytes()
    again = merge(dare, tuned, base, fresh=True)
    assert (again.folder / "model.safetensors").read_bytes() == here


@pytest.mark.parametrize("here", [False, True])
def test_a_failing_mergekit_is_told_in_one_line(cache, encoders, here):
    base, *tuned = encoders
    unknown = Candidate("no_such_method", "")
    with pytest.raises(MergeError, match=r"mergekit.* failed: .*no_such_method") as caught:
        merge(unknown, tuned, base, here=here)
    assert "\n" not in str(caught.value)
    assert [path for path in (cache / "merges").iterdir() if path.is_dir()] == []


@pytest.fixture
def result():
    """A result with two tasks."""

    def row(method, first, second, merged=True):
        test = {"a": first, "b": second}
        mean = (first + second) / 2
        means = {"mean": mean, "share": mean, "merged": merged}
        return {"method": method, "setting": "x", "test": test, **means}

    rows = [row("pretrained", 0.1, 0.2, False), row("fine-tuned", 1.0, 1.0, False)]
    rows += [row("linear", 0.4, 0.5), row("cart", 0.6, 0.7)]
    counts = {"validation": 3, "test": 5}
    measured = [{"cart_plugin": "0.1.0", "commit": "abc1234", "date": "2026-11-25"}]
    tasks = {"a": "Task A", "b": "Task B"}
    two = [row("fine-tuned", 1.0, 1.0), row("linear", 0.6, 0.7), row("cart_auto", 0.8, 0.9)]
    return {"tasks": tasks, "rows": rows, "two": two, "counts": counts, "measured": measured}


def test_the_markdown_table_has_a_row_a_method_and_marks_the_best(result):
    text = report.markdown(result)
    assert "Made by `make demo` (cart-plugin 0.1.0, commit abc1234, 2026-11-25)." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert lines[0].startswith("| method | Task A | Task B | mean | of fine-tuned |")
    assert lines[-1].startswith("| **cart** | **60.0** | **70.0** | **65.0** | **65 %** |")
    assert {line.count("|") for line in lines} == {7}
    assert text.endswith(
        "Two models alone (Task A and Task B), mean of both: fine-tuned 100.0, linear 65.0, "
        "cart_auto 85.0.\n"
    )


def test_the_plot_is_written(result, tmp_path):
    report.save_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_demo_on_a_tiny_suite(tiny_suite, monkeypatch, tmp_path):
    pytest.importorskip("cart_plugin.mergekit")
    from tests.benchmarks.synthetic import BLOCKS

    names = ["blocks", "more", "most"]
    for name in names[1:]:
        monkeypatch.setitem(tasks.TASKS, name, BLOCKS)
    write_json(tiny_suite / MANIFEST, {})
    monkeypatch.setattr(backbone, "backbone_folder", lambda: tiny_suite)
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
    assert [row["method"] for row in saved["two"]] == ["fine-tuned", "linear", "cart_auto"]
    assert all(row["test"].keys() == {"blocks", "more"} for row in saved["two"])
    assert str(tmp_path) not in (out / "results.json").read_text()
    check_plain_lines(outcome.output, out)

    monkeypatch.setattr(recipes, "run_mergekit", None)  # the second time the cache answers
    monkeypatch.setattr(recipes, "call_mergekit", None)
    monkeypatch.setattr(finetune, "train_encoder", None)
    again = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert json.loads((out / "results.json").read_text()) == saved


def check_plain_lines(output, out):
    """Stages in their order, the table, then times and what to do next; no bar is redrawn."""
    assert "\r" not in output
    assert "\x1b" not in output
    parts = [
        *("1/4 images", "2/4 fine-tune", "3/4 merge 12 recipes", "4/4 test 12 models"),
        *(
            "Test accuracy in per cent",
            "Two models alone",
            str(out / "accuracy.png"),
            "s  images and",
            "s  fine-tune",
        ),
        *("s  merge 12", "s  test 12", "s  in all", "merge_method: cart_auto"),
        *("mergekit-cart doctor my.yaml", "mergekit-yaml my.yaml", "mergekit-cart compare my.yaml"),
    ]
    places = [output.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_an_unknown_task_ends_with_one_line(cache):
    outcome = CliRunner().invoke(demo.main, ["--tasks", "mnits"])
    assert outcome.exit_code == 1
    assert "Error: unknown task 'mnits'; the tasks are mnist" in outcome.output


def test_the_end_names_a_recipe_and_commands_that_exist():
    from mergekit.config import MergeConfiguration

    from cart_plugin.cli import main

    recipe, _, commands = report.NEXT.partition("  mergekit-cart doctor")
    MergeConfiguration.model_validate(yaml.safe_load(recipe.split("\n\n")[1]))
    assert {"doctor", "compare"} <= set(main.list_commands(click.Context(main)))
    assert "mergekit-cart compare my.yaml --tasks" in commands


def plain_console():
    return Console(file=io.StringIO(), width=100)


def test_where_there_is_no_terminal_a_stage_is_a_few_plain_lines():
    console = plain_console()
    stages = Stages(console, 2)
    with stages.stage("first", 4) as stage:
        for step in range(40):
            stage.advance(0.1)
            if step == 19:
                stage.tell("half")
    assert re.sub(r"\d+ s", "N s", console.file.getvalue()).splitlines() == [
        "1/2 first",
        *("    25 % after N s", "    50 % after N s", "    half", "    75 % after N s"),
        "    done: N s",
    ]


def test_on_a_terminal_a_stage_leaves_its_lines_and_its_time():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stages = Stages(console, 2)
    for title in ("first", "second"):
        with stages.stage(title, 1) as stage:
            stage.tell("kept")
            stage.advance(1)
    left = console.file.getvalue()
    assert left.count("    kept") == 2
    assert re.search(r"1/2 first: \d+ s", left)
    assert list(stages.seconds) == ["first", "second"]


def test_a_stage_that_fails_has_no_time():
    stages = Stages(plain_console(), 1)
    with pytest.raises(MergeError), stages.stage("first", 1):
        raise MergeError("no")
    assert stages.seconds == {}


def halves(told, value):
    told(0.25)
    return 2 * value


def failing(told):
    raise MergeError("lost tensors")


@pytest.mark.parametrize("count", [0, 1])
def test_workers_tell_each_job_whole_and_hand_over_results_and_errors(count):
    with work.Workers(count) as workers:
        jobs = {workers.submit(halves, value): value for value in range(3)}
        shares = []
        for future in workers.finished(jobs, shares.append):
            assert future.result() == 2 * jobs[future]
        assert sum(shares) == 3
        assert shares.count(0.25) == 3
        with pytest.raises(MergeError, match="lost tensors"):
            workers.submit(failing).result()


def test_fine_tuning_tells_each_step(tiny_suite):
    told = []
    finetune.finetune_task("blocks", 0, QUICK, told.append)
    assert told == [1 / 6] * 6


def test_images_are_decoded_once_for_many_models(tiny_suite, encoders, monkeypatch):
    prepare_task("blocks")
    finetune.finetune_task("blocks", 0, QUICK)
    read = []

    def load_split(name, split):
        read.append((name, split))
        return tasks.load_split(name, split)

    monkeypatch.setattr(evaluator, "load_split", load_split)
    evaluate = Evaluator.of_tuned(["blocks"], 0, QUICK, {"validation": 12, "test": 20})
    for folder in encoders:
        for split in ("validation", "test"):
            assert evaluate(folder, split).keys() == {"blocks"}
    assert read == [("blocks", "validation"), ("blocks", "test")]


def test_a_known_model_is_not_evaluated_again(tiny_suite, monkeypatch):
    prepare_task("blocks")
    folder = finetune.finetune_task("blocks", 0, QUICK)
    evaluate = Evaluator.of_tuned(["blocks"], 0, QUICK, {"test": 20})
    first = evaluate(folder, "test")
    monkeypatch.setattr(evaluator, "_images", None)
    assert evaluate(folder, "test") == first
