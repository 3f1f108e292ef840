"""`mergekit-cart compare` on tiny models, with evaluators that read the merged files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file

from cart_plugin import CartError
from cart_plugin.cli import main
from cart_plugin.compare import steps
from cart_plugin.compare.judge import figures
from cart_plugin.compare.steps import needed_bytes
from tests.doctor.tiny import save_models

EVALUATORS = "tests.compare.evaluators"


def recipe_for(folders: list[str], file: Path, **more: Any) -> Path:
    document = {
        "merge_method": "cart",
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:]],
        "dtype": "float32",
        **more,
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("llamas"), "llama", count=4)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Any]:
    def run(recipe: Path, *arguments: str, evaluator: str = "mean_sizes") -> Any:
        command = ["compare", str(recipe), "--out", str(tmp_path / "out")]
        if evaluator:
            command += ["--evaluator", f"{EVALUATORS}:{evaluator}"]
        return CliRunner().invoke(main, [*command, *arguments])

    return run


def rows(out: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((out / "report.json").read_text())
    return {row["name"]: row for row in report["rows"]}


def test_methods_and_inputs_are_compared(
    llamas: list[str],
    compare: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    done = compare(
        recipe,
        "--methods",
        "linear,cart,slerp",
        "--set",
        "cart.rank_ratio=0.5",
        "--keep-models",
        "all",
    )
    assert done.exit_code == 0, done.output
    found = rows(tmp_path / "out")
    assert list(found) == [
        *(f"input-llama-{number}" for number in range(4)),
        "linear",
        "cart",
        "slerp",
    ]
    assert "slerp needs t" in found["slerp"]["error"]

    # By hand: the kept recipe, and the evaluator on what it makes.
    by_hand = tmp_path / "by-hand"
    subprocess.run(
        ["mergekit-yaml", str(tmp_path / "out" / "cart" / "recipe.yaml"), str(by_hand)],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    merged, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out/cart/model", by_hand)
    )
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    from tests.compare.evaluators import mean_sizes

    assert found["cart"]["metrics"]["vectors"]["value"] == mean_sizes(str(by_hand))["vectors"]
    assert found["cart"]["metrics"]["matrices"]["stderr"] == 0.01

    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r"""(?:src|href)=["']https?:|@import|url\(http""", page)
    assert 'href="cart/recipe.yaml"' in page
    assert "slerp needs t" in page
    assert "slerp needs t" in (tmp_path / "out" / "report.md").read_text()

    # Again: nothing is merged or evaluated, and the report is the same.
    before = (tmp_path / "out" / "report.json").read_bytes()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("merge.log")}
    again = compare(
        recipe,
        "--methods",
        "linear,cart,slerp",
        "--set",
        "cart.rank_ratio=0.5",
        "--keep-models",
        "all",
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("merge.log")
    } == times

    # Other sources of the plugin: only its own methods are merged anew.
    monkeypatch.setattr(steps, "_sources", lambda: "others")
    options = ("--set", "cart.rank_ratio=0.5", "--keep-models", "all")
    assert compare(recipe, "--methods", "linear,cart,slerp", *options).exit_code == 0
    changed = [file.parent.name for file in times if file.stat().st_mtime_ns != times[file]]
    assert changed == ["cart"]


@pytest.mark.slow
def test_only_the_best_model_is_kept(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    grid = ("--methods", "cart", "--grid", "cart.lambda=1,3,2", "cart.rank_ratio=0.5")
    assert compare(recipe, *grid).exit_code == 0
    found = rows(tmp_path / "out")
    best = max(found.values(), key=lambda row: row["mean"] if row["kind"] == "merged" else -1)
    assert best["name"] == "cart-lambda=3.0-rank_ratio=0.5"
    kept = [path.parent.name for path in (tmp_path / "out").glob("*/model")]
    assert kept == [best["name"]]

    assert compare(recipe, *grid, "--keep-models", "none").exit_code == 0
    assert not list((tmp_path / "out").glob("*/model"))
    assert compare(recipe, *grid, "--keep-models", "best").exit_code == 0  # made again
    assert [path.parent.name for path in (tmp_path / "out").glob("*/model")] == [best["name"]]


@pytest.mark.parametrize("architecture", ["dinov2", "bert"])
def test_what_mergekit_cannot_merge_whole_is_merged_tensor_by_tensor(
    architecture: str, compare: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    folders = save_models(tmp_path / "models", architecture, count=4)
    (Path(folders[0]) / "preprocessor_config.json").write_text("{}")
    weights = Path(folders[0]) / "model.safetensors"  # the base's, with a buffer that others lack
    held = {**load_file(weights), "embeddings.position_ids": torch.arange(8)}
    save_file(held, weights, metadata={"format": "pt"})
    recipe = recipe_for(folders, tmp_path / "mine.yaml", parameters={"lambda": 2.0})
    done = compare(recipe, "--methods", "cart", "--keep-models", "all")
    assert done.exit_code == 0, done.output
    row = rows(tmp_path / "out")["cart"]
    assert row["note"]
    assert row["flat_recipe"] == "cart/recipe-flat.yaml"
    assert 'href="cart/recipe-flat.yaml"' in (tmp_path / "out" / "report.html").read_text()
    assert "(cart/recipe-flat.yaml)" in (tmp_path / "out" / "report.md").read_text()
    model = tmp_path / "out" / "cart" / "model"
    merged = load_file(model / "model.safetensors")
    assert merged.keys() == load_file(Path(folders[1]) / "model.safetensors").keys()
    assert (model / "preprocessor_config.json").exists()
    loaded, info = transformers.AutoModel.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.hidden_size == 32


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_repeats_only_the_step_it_was_in(
    llamas: list[str], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    out, started = tmp_path / "out", tmp_path / "started"
    command = [sys.executable, "-m", "cart_plugin", "compare", str(recipe), "--out", str(out)]
    command += ["--evaluator", f"{EVALUATORS}:slow", "--methods", "linear,cart"]
    environment = {**os.environ, "STARTED": str(started)}

    # In the middle of a merge: as soon as mergekit's process has begun.
    kill_when(command, environment, lambda: (out / "linear" / "merge.log").exists())
    seen = started.read_text().splitlines()
    assert len(seen) == 4  # the inputs
    assert not (out / "linear" / "model").exists()

    # In the middle of an evaluation: the evaluator of a merged model waits until it is killed.
    waiting = {**environment, "WAIT": "yes"}
    kill_when(command, waiting, lambda: len(started.read_text().splitlines()) > len(seen))
    assert (out / "linear" / "model").is_dir()
    merge_log = (out / "linear" / "merge.log").stat().st_mtime_ns

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = [Path(line).parent.name for line in started.read_text().splitlines()[len(seen) :]]
    assert judged == ["linear", "linear", "cart"]
    assert (out / "linear" / "merge.log").stat().st_mtime_ns == merge_log
    assert not list(out.rglob(".merging-*"))

    fresh = subprocess.run(
        [part if part != str(out) else str(tmp_path / "fresh") for part in command],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0
    for name, row in rows(out).items():
        assert row["metrics"] == rows(tmp_path / "fresh")[name]["metrics"]


def test_a_second_comparison_in_the_same_folder_is_refused(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        done = compare(recipe_for(llamas, tmp_path / "mine.yaml"), "--methods", "linear")
    assert done.exit_code == 1
    assert done.output.startswith("Error: another comparison is at work in ")


def test_models_that_differ_are_not_merged_by_what_they_share(
    compare: Callable[..., Any], tmp_path: Path
) -> None:
    folders = save_models(tmp_path / "models", "llama", count=3)
    larger = save_models(tmp_path / "larger", "llama", count=1, num_hidden_layers=6)
    done = compare(recipe_for([*larger, *folders], tmp_path / "mine.yaml"), "--methods", "cart")
    assert done.exit_code == 1
    error = rows(tmp_path / "out")["cart"]["error"]
    assert "the models do not hold the same tensors" in error
    assert not (tmp_path / "out" / "cart" / "model").exists()


def test_groups_and_tags_of_lm_eval_are_opened() -> None:
    def entry(kind: str, *tags: str) -> SimpleNamespace:
        return SimpleNamespace(kind=SimpleNamespace(name=kind), tags=set(tags))

    manager = SimpleNamespace(
        match_tasks=lambda names: names,
        task_index={
            "sum": entry("GROUP"),
            "bare": entry("GROUP"),
            "tag": entry("TAG", "a", "b"),
            **{name: entry("TASK", "tag") for name in "abc"},
        },
    )
    one = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x"}
    answer = {
        "results": {"a": one, "b": one, "c": one, "bare": {"alias": "bare"}},
        "groups": {"sum": one},
        "group_subtasks": {"sum": ["a"], "bare": ["c"], "a": []},
        "higher_is_better": {"a": {"acc": True}},
    }
    for asked, expected in (
        (["sum", "tag"], ["sum", "a", "b"]),
        (["bare"], ["c"]),
        (["tag"], ["a", "b"]),
    ):
        found = figures(answer, asked, manager)
        assert list(found) == expected
        assert all(figure["value"] == 0.5 for figure in found.values())
    answer["results"]["c"] = {"alias": "c"}
    with pytest.raises(CartError, match="no number for c"):
        figures(answer, ["c"], manager)


def test_outputs_that_cannot_be_written_are_told(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    (tmp_path / "out").write_text("a file")
    done = compare(recipe, "--methods", "linear")
    assert done.exit_code == 1
    assert done.output.strip().endswith("out is a file; name a folder")
    assert "Traceback" not in done.output


def test_nothing_is_merged_for_an_evaluator_that_always_fails(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    done = compare(recipe, "--methods", "linear,cart", evaluator="words")
    assert done.exit_code == 1
    found = rows(tmp_path / "out")
    for name in ("linear", "cart"):
        assert found[name]["error"].startswith("not merged, since no input could be evaluated: ")
        assert not (tmp_path / "out" / name / "merge.log").exists()


def test_models_of_an_earlier_comparison_are_not_removed_as_its_own(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "cart" / "model"
    shutil.copytree(llamas[1], kept)
    recipe = recipe_for([llamas[0], str(kept), *llamas[2:]], tmp_path / "mine.yaml")
    done = compare(recipe, "--methods", "cart")
    assert "lies where this comparison would write" in done.output
    assert kept.is_dir()


@pytest.mark.parametrize(("keep", "models"), [("none", 1), ("best", 2), ("all", 3)])
def test_models_that_are_there_need_no_more_disk(keep: Any, models: int, tmp_path: Path) -> None:
    request = SimpleNamespace(
        inputs=SimpleNamespace(bytes=10, adapters={}),
        variants=[SimpleNamespace(name=name) for name in ("a", "b", "c")],
        out=tmp_path,
        keep=keep,
    )
    assert needed_bytes(request) == 10 * models  # type: ignore[arg-type]
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert needed_bytes(request) == 10  # type: ignore[arg-type]


def kill_when(command: list[str], environment: dict[str, str], ready: Callable[[], bool]) -> None:
    """Start a command in a session of its own, and kill it (not its children) when it is time."""
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not ready():
        assert running.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()


@pytest.mark.parametrize(
    ("evaluator", "reason"),
    [
        ("raising", "RuntimeError: out of patience"),
        ("nothing", "the evaluator returned NoneType"),
        ("words", "the evaluator's accuracy is no number: 'good'"),
        ("infinite", "the evaluator's accuracy is nan"),
    ],
)
def test_an_evaluator_of_no_use_is_a_line_of_the_report(
    evaluator: str, reason: str, llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")
    done = compare(recipe, "--methods", "linear", evaluator=evaluator)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert reason in rows(tmp_path / "out")["linear"]["error"]
    assert reason in done.output
    # The inputs' rows are there all the same, where the evaluator could judge them.
    assert (rows(tmp_path / "out")["input-llama-0"]["mean"] is not None) == (evaluator == "raising")


def test_wrong_commands_end_in_one_line(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(llamas, tmp_path / "mine.yaml")

    def line(*arguments: str, file: Path = recipe, evaluator: str = "mean_sizes") -> str:
        done = compare(file, *arguments, evaluator=evaluator)
        assert done.exit_code == 1, done.output
        assert done.output.startswith("Error: "), done.output
        assert done.output.count("\n") == 1, done.output
        return str(done.output)

    (tmp_path / "not.yaml").write_text("models: [")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "not valid YAML" in line(file=tmp_path / "not.yaml")
    assert "not a recipe" in line(file=tmp_path / "list.yaml")
    assert "cannot be read" in line(file=tmp_path / "absent.yaml")
    gone = recipe_for([*llamas, str(tmp_path / "gone")], tmp_path / "gone.yaml")
    assert f"{tmp_path}/gone does not exist" in line(file=gone)
    assert "did you mean cart?" in line("--methods", "crat")
    assert "has no parameter 'density'" in line("--grid", "cart.density=0.1,0.2")
    assert "either --tasks" in line("--tasks", "arc_easy")
    assert "either --tasks" in line(evaluator="")
    assert "option of lm-eval" in line("--limit", "3")
    assert "cannot be found" in line(evaluator="absent")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    assert "free" in line()
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_lm_eval_judges_as_by_hand(tmp_path: Path, compare: Callable[..., Any]) -> None:
    pytest.importorskip("lm_eval")
    from tests.fusion_bench import pools

    tasks = pools.save_language_task(tmp_path / "tasks")
    folders = [
        str(pools.save_language_model(tmp_path / f"model-{number}", seed=number))
        for number in range(3)
    ]
    recipe = recipe_for(folders, tmp_path / "mine.yaml")
    options = (
        "--include-path",
        str(tasks),
        "--limit",
        "4",
        "--batch-size",
        "2",
        "--dtype",
        "float32",
    )
    unknown = compare(recipe, "--tasks", "tiny_choice,absent", *options, evaluator="")
    assert "lm-eval does not know absent" in unknown.output

    done = compare(
        recipe,
        "--methods",
        "cart",
        "--tasks",
        "tiny_choice",
        "--keep-models",
        "all",
        *options,
        evaluator="",
    )
    assert done.exit_code == 0, done.output
    row = rows(tmp_path / "out")["cart"]

    binaries = Path(sys.executable).parent
    merged = tmp_path / "by-hand"
    kept = tmp_path / "out" / "cart" / "recipe.yaml"
    subprocess.run([binaries / "mergekit-yaml", kept, merged], check=True, capture_output=True)
    command = [binaries / "lm-eval", "run", "--model", "hf", "--tasks", "tiny_choice"]
    command += ["--model_args", f"pretrained={merged},dtype=float32", "--include_path", tasks]
    command += ["--limit", "4", "--batch_size", "2", "--output_path", tmp_path / "lm-eval"]
    command += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    (written,) = (tmp_path / "lm-eval").rglob("results_*.json")
    by_hand = json.loads(written.read_text())["results"]["tiny_choice"]
    assert row["metrics"]["tiny_choice"]["metric"] == "acc,none"
    assert row["metrics"]["tiny_choice"]["value"] == by_hand["acc,none"]
    assert row["metrics"]["tiny_choice"]["stderr"] == by_hand["acc_stderr,none"]


def test_options_of_lm_eval_are_passed_on_zero_too() -> None:
    from cart_plugin.cli.compare import _request

    options = {"num_fewshot": 0, "limit": None, "apply_chat_template": False, "dtype": "float32"}
    request = _request("arc_easy, gsm8k", None, options)
    assert request["tasks"] == ["arc_easy", "gsm8k"]
    assert request["options"] == {"num_fewshot": 0}
    assert request["model_args"] == {"dtype": "float32"}


@pytest.mark.slow
def test_adapters_on_one_base_are_merged(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed in range(3):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llamas[0]), config)
        model.save_pretrained(tmp_path / f"lora-{seed}")
    adapted = [f"{llamas[0]}+{tmp_path}/lora-{seed}" for seed in range(3)]
    recipe = recipe_for([llamas[0], *adapted], tmp_path / "mine.yaml")
    done = compare(recipe, "--methods", "linear", "--keep-models", "all")
    assert done.exit_code == 0, done.output
    # An adapter has a row like any other input: what it makes of the base, for the time of judging.
    from tests.compare.evaluators import mean_sizes

    found = rows(tmp_path / "out")
    assert list(found) == ["input-llama-0", *(f"input-lora-{seed}" for seed in range(3)), "linear"]
    fused = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llamas[0]), str(tmp_path / "lora-1")
    )
    fused.merge_and_unload().save_pretrained(tmp_path / "fused")
    expected = mean_sizes(str(tmp_path / "fused"))["matrices"]
    assert abs(found["input-lora-1"]["metrics"]["matrices"]["value"] - expected) < 1e-7
    assert expected != found["input-llama-0"]["metrics"]["matrices"]["value"]
    assert not (tmp_path / "out" / "input-lora-1" / "model").exists()

    merged = load_file(tmp_path / "out" / "linear" / "model" / "model.safetensors")
    base = load_file(Path(llamas[0]) / "model.safetensors")
    changed = {name for name in base if not torch.allclose(merged[name], base[name], atol=1e-6)}
    assert changed == {name for name in base if "q_proj" in name}
