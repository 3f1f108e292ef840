"""`mergekit-cart compare` on tiny models, with evaluators that read the merged files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cart_plugin.compare import steps
from tests.compare.helpers import EVALUATORS, recipe_for, rows
from tests.doctor.tiny import save_models


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
        "--also",
        llamas[3],
    )
    assert done.exit_code == 0, done.output
    found = rows(tmp_path / "out")
    assert list(found) == [
        *(f"input-llama-{number}" for number in range(4)),
        "also-llama-3",
        "linear",
        "cart",
        "slerp",
    ]
    assert "slerp needs t" in found["slerp"]["error"]

    # A model of another tool is judged as it is, and not ours to remove.
    assert found["also-llama-3"]["metrics"] == found["input-llama-3"]["metrics"]
    assert "llama-3 (as it is)" in (tmp_path / "out" / "report.md").read_text()
    assert Path(llamas[3], "config.json").is_file()

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
        "--also",
        llamas[3],
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("merge.log")
    } == times

    # Another revision of the plugin: only its own methods are merged anew.
    monkeypatch.setattr(steps, "_REVISIONS", [0, 0])
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
    parameters = {"lambda": 2.0, "rank": 32}  # all of them
    recipe = recipe_for(folders, tmp_path / "mine.yaml", parameters=parameters)
    done = compare(recipe, "--methods", "cart", "--keep-models", "all")
    assert done.exit_code == 0, done.output
    row = rows(tmp_path / "out")["cart"]
    assert row["note"]
    assert "nearly the plain average" in row["warning"]
    assert row["warning"] in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out/cart/merge.json").read_text())["warning"] == row["warning"]
    assert "merged tensor by tensor" in (tmp_path / "out" / "report.html").read_text()
    assert "cart: merged tensor by tensor" in (tmp_path / "out" / "report.md").read_text()
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
