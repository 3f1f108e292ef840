"""`mergekit-cart merge`: what it writes, when it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result
from safetensors.torch import load_file

from cart_plugin.execution import child
from tests.doctor.tiny import (
    change_config,
    edit_weights,
    load_tensors,
    save_model,
    save_models,
    write_recipe,
)
from tests.mergekit.helpers import digest

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


def refuses(done: Result, *parts: str) -> None:
    """Assert exit code 1 and one clear line."""
    assert done.exit_code == 1, done.output
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("Error: "), done.output
    for part in parts:
        assert part in last
    assert "Traceback" not in done.output


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


def test_mergekits_plan_gives_mergekit_yamls_bytes(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("llama"))
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "merged by mergekit's plan: it keeps all tensors" in done.output.splitlines()[-1]
    program = Path(sys.executable).parent / "mergekit-yaml"
    subprocess.run([program, recipe, tmp_path / "theirs"], check=True, capture_output=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "theirs")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == recipe.read_text()
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_what_mergekit_loses_or_cannot_plan_is_merged_tensor_by_tensor(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved(architecture)
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "merged tensor by tensor: mergekit" in done.output.splitlines()[-1]
    assert "merged tensor by tensor instead" in done.output
    assert load_tensors(tmp_path / "out").keys() == load_tensors(models[0]).keys()


def test_options_of_mergekit_are_taken_and_in_the_help(merge: Merge, saved: Saved) -> None:
    text = merge("--help").output
    assert "--lora-merge-cache" in text
    assert "--cuda / --no-cuda" in text
    assert text.rstrip().splitlines()[-1].split()[0] in ("-h,", "--help")


def test_shards_and_no_card(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("vit"))
    done = merge(recipe, tmp_path / "out", "--out-shard-size", "10K", "--no-write-model-card")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_problem_ends_the_merge_and_force_goes_on(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("llama"), parameters={"rank_rati": 0.1})
    refuses(merge(recipe, tmp_path / "out"), "not merged: ", "rank_rati", "--force")
    assert left(tmp_path) == []
    assert merge(recipe, tmp_path / "out", "--force").exit_code == 0
    assert left(tmp_path) == ["out"]


def test_models_that_differ_are_refused_with_force_too(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = [*saved("vit"), *save_models(tmp_path / "m", "vit", 1, num_hidden_layers=3)]
    refuses(merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out", "--force"))
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokenizer": {"source": "base"}}, "delete the recipe's tokenizer settings"),
        ({"models": None}, "only whole models can be"),
    ],
)
def test_what_cannot_be_done_tensor_by_tensor_says_so(
    settings: dict[str, Any], reason: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved("bert")
    if "models" in settings:
        sources = [{"model": model, "layer_range": [0, 2]} for model in models]
        settings = {**settings, "slices": [{"sources": sources}]}
    recipe = write_recipe(tmp_path / "r.yaml", models, **settings)
    refuses(merge(recipe, tmp_path / "out", "--force"), "tensor by tensor: ", reason)


def test_an_existing_folder_and_an_input_are_left_alone(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    own = [
        str(shutil.copytree(model, tmp_path / f"m{n}")) for n, model in enumerate(saved("llama"))
    ]
    before = [digest(Path(model)) for model in own]
    recipe = write_recipe(tmp_path / "r.yaml", own)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for out in (tmp_path / "out", own[0], f"{own[1]}/merged", tmp_path):
        refuses(merge(recipe, out, "--force"))
    assert [digest(Path(model)) for model in own] == before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (Path(own[1]) / "merged").exists()


def test_infinity_is_not_saved(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    own = [
        str(shutil.copytree(model, tmp_path / f"m{n}")) for n, model in enumerate(saved("llama"))
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    for model in own:
        edit_weights(model, lambda tensors: tensors[name].mul_(0).add_(1e6))
    recipe = write_recipe(
        tmp_path / "r.yaml", own, merge_method="linear", dtype="float32", out_dtype="float16",
        parameters={"weight": 1.0},
    )  # fmt: skip
    refuses(merge(recipe, tmp_path / "out", "--force"), "infinity", name)
    assert left(tmp_path) == []


def test_config_says_what_was_saved(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    own = [
        str(shutil.copytree(model, tmp_path / f"m{n}")) for n, model in enumerate(saved("llama"))
    ]
    tied = str(save_model(tmp_path / "base", "llama", 9, tie_word_embeddings=True))
    for model in own:
        change_config(model, dtype="bfloat16")
    recipe = write_recipe(tmp_path / "r.yaml", own, base_model=tied, out_dtype="float16")
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is False
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_processor_tokenizer_and_generation_config_come_along(merge: Merge, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "vit")
    for name in (
        "preprocessor_config.json",
        "generation_config.json",
        "video_preprocessor_config.json",
    ):
        (Path(models[0]) / name).write_text("{}")
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"preprocessor_config.json", "video_preprocessor_config.json", "config.json"}


def lora(base: str, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_adapters_are_fused_by_what_is_in_them(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    base = saved("llama")[0]
    adapters = [lora(base, tmp_path / f"lora-{seed}", seed) for seed in range(3)]
    recipe = write_recipe(
        tmp_path / "r.yaml",
        [f"{base}+{adapter}" for adapter in adapters],
        merge_method="linear",
        parameters={"weight": 1.0},
    )
    cache = tmp_path / "cache"

    def query() -> torch.Tensor:
        done = merge(recipe, tmp_path / "out", "--lora-merge-cache", cache, "--force")
        assert done.exit_code == 0, done.output
        found = load_tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
        shutil.rmtree(tmp_path / "out")
        return found

    def expected() -> torch.Tensor:
        total = load_tensors(base)["model.layers.0.self_attn.q_proj.weight"].double()
        for adapter in adapters:
            held = load_file(adapter / "adapter_model.safetensors")
            part = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
            update = held[part.format("B")].double() @ held[part.format("A")].double()
            total += 8 / 2 * update / 3  # lora_alpha / r
        return total

    assert torch.allclose(query().double(), expected(), atol=1e-6)
    assert len(list(cache.iterdir())) == 3
    lora(base, adapters[1], 7)  # trained anew, under the same path
    assert torch.allclose(query().double(), expected(), atol=1e-6)
    assert len(list(cache.iterdir())) == 4


def test_an_adapter_of_another_model_is_refused(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    other = save_models(tmp_path / "models", "llama", 1, hidden_size=64)[0]
    adapter = lora(other, tmp_path / "lora", 0)
    models = [*saved("llama")[:2], f"{saved('llama')[0]}+{adapter}"]
    refuses(
        merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out", "--force"), "adapter"
    )
    assert left(tmp_path) == []


def test_dtypes_that_mergekit_does_not_know_are_one_line(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    base = saved("llama")[0]
    recipe = write_recipe(tmp_path / "r.yaml", saved("llama"), dtype="bf16")
    refuses(merge(recipe, tmp_path / "out", "--force"), "mergekit cannot merge in bf16")
    models = [*saved("llama")[1:], f"{base}+{lora(base, tmp_path / 'lora', 0)}"]
    options = ["--force", "--lora-merge-dtype", "bf16"]
    recipe = write_recipe(tmp_path / "r.yaml", models)
    refuses(merge(recipe, tmp_path / "out", *options), "--lora-merge-dtype: ", '"bf16"')


def test_one_adapter_under_two_paths_is_named_before_it_is_fused(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("llama")[0]
    adapters = [lora(base, tmp_path / f"lora-{seed}", seed) for seed in range(2)]
    copy = shutil.copytree(adapters[0], tmp_path / "copy")
    monkeypatch.setattr(child, "run", None)
    labels = [f"{base}+{adapter}" for adapter in (*adapters, copy)]
    recipe = write_recipe(tmp_path / "r.yaml", labels)
    done = merge(recipe, tmp_path / "out", "--force")
    refuses(done, f"{labels[0]} and {labels[2]} are one model", "name one")


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_room_is_asked_for_the_result(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = saved(architecture)
    size = sum(tensor.nbytes for tensor in load_tensors(models[0]).values())
    recipe = write_recipe(tmp_path / "r.yaml", models, out_dtype="bfloat16")

    def within(room: float) -> Result:
        usage = shutil._ntuple_diskusage(10**9, 0, int(room * size))
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        return merge(recipe, tmp_path / "out", "--force")

    refuses(within(0.4), f"bytes free and {size // 2:,} are needed")
    done = within(0.6)
    assert done.exit_code == 0, done.output


def test_room_is_asked_for_the_fused_models(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("llama")[0]
    size = sum(tensor.nbytes for tensor in load_tensors(base).values())
    adapters = [lora(base, tmp_path / f"lora-{seed}", seed) for seed in range(2)]
    recipe = write_recipe(tmp_path / "r.yaml", [f"{base}+{adapter}" for adapter in adapters])

    def within(room: float, *options: object) -> Result:
        usage = shutil._ntuple_diskusage(10**9, 0, int(room * size))
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        return merge(recipe, tmp_path / "out", "--force", *options)

    for options in ([], ["--workers", 1]):
        refuses(within(1.9, *options), f"bytes free and {2 * size:,} are needed")
    half = ["--lora-merge-dtype", "float16"]
    refuses(within(0.9, *half), f"bytes free and {size:,} are needed")
    assert left(tmp_path) == []
    done = within(1.1, *half, "--lora-merge-cache", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    shutil.rmtree(tmp_path / "out")
    done = within(0.6, *half, "--lora-merge-cache", tmp_path / "cache")  # they are there
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_finished(saved: Saved, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("vit"))
    command = [sys.executable, "-m", "cart_plugin", "merge", str(recipe), str(tmp_path / "out")]
    unfinished = tmp_path / ".out.unfinished"
    for stage in (".merging/merge.log", "model.safetensors"):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
        deadline = time.monotonic() + 120
        while not (unfinished / stage).exists() and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert left(tmp_path) == ["out"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_what_a_merge_warns_of_is_told_once(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved(architecture), parameters={"rank": 32})
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    *_, warning, wrote = done.output.splitlines()
    assert warning.startswith("warning: ")
    assert "decomposed tensors kept at least 99%" in warning
    assert done.output.count("kept at least") == 1
    assert wrote.startswith("wrote ")
    assert ("tensor by tensor" in wrote) == (architecture == "bert")
    assert not list((tmp_path / "out").rglob("warnings.json"))
