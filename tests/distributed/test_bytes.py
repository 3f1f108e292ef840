"""A merge by one worker gives the files that it gives without; several are in `test_ray`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from mergekit.scripts import run_yaml

from cart_plugin.checkpoints.writing import TensorFile
from cart_plugin.distributed import plan
from cart_plugin.distributed.reading import Reader
from tests.distributed.conftest import METHODS, SHARDS, contents, halve, left, recipe_of
from tests.doctor.tiny import (
    SIZES,
    change_config,
    edit_weights,
    load_tensors,
    save_class,
    save_models,
    save_tokenizer,
    write_recipe,
)
from tests.execution.test_command import lora
from tests.execution.test_slices import LAYERS
from tests.execution.test_slices import recipe as stacked
from tests.execution.test_tied import HEAD, LINEAR, save, untie
from tests.mergekit.helpers import digest, pickle

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


def same(merge: Merge, recipe: Path, folder: Path, *options: object) -> Result:
    """Assert that one worker makes the files that `merge` makes today; what it said."""
    plain = merge(recipe, folder / "plain" / "out", *options)
    done = merge(recipe, folder / "out", "--workers", 1, *options)
    assert (plain.exit_code, done.exit_code) == (0, 0), plain.output + done.output
    assert contents(folder / "out") == contents(folder / "plain" / "out")
    wrote, before = (said.output.splitlines()[-1].partition(":")[2] for said in (done, plain))
    assert wrote == before
    assert left(folder) == ["out"]
    return done


@pytest.mark.parametrize("method", METHODS)
def test_mergekit_yamls_bytes(method: str, merge: Merge, saved: Saved, tmp_path: Path) -> None:
    recipe = recipe_of(method, saved("llama"), tmp_path)
    done = merge(recipe, tmp_path / "out", "--workers", 1, *SHARDS)
    assert done.exit_code == 0, done.output
    theirs = CliRunner().invoke(run_yaml.main, [str(recipe), str(tmp_path / "theirs"), *SHARDS])
    assert theirs.exit_code == 0, theirs.output
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 10
    assert digest(tmp_path / "out") == digest(tmp_path / "theirs")
    for name in ("model.safetensors.index.json", "config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_the_program_mergekit_yaml_gives_these_bytes(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    merge(recipe, tmp_path / "out", "--workers", 1)
    program = Path(sys.executable).parent / "mergekit-yaml"
    subprocess.run([program, recipe, tmp_path / "theirs"], check=True, capture_output=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "theirs")


@pytest.mark.parametrize("architecture", ["vit", "bert", "qwen3-moe"])
def test_tensor_by_tensor_and_experts(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved(architecture))
    same(merge, recipe, tmp_path, *SHARDS)


def test_units_of_several_tensors_lie_on_both_sides_of_a_shards_end(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    # Stored expert by expert, merged as stacks: one stack is larger than a shard.
    models = saved("mixtral")
    recipe = write_recipe(tmp_path / "r.yaml", models, tokenizer=None)
    for model in models:
        assert (Path(model) / "model.safetensors").exists()
    same(merge, recipe, tmp_path, "--out-shard-size", "9K")


@pytest.mark.parametrize("options", [[], SHARDS], ids=["one shard", "several"])
def test_shards_in_pieces(
    options: list[str], merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PIECE", 9000)
    recipe = write_recipe(tmp_path / "r.yaml", saved("vit"))
    same(merge, recipe, tmp_path, *options)


def test_slices_that_repeat_layers(merge: Merge, tmp_path: Path) -> None:
    models = save_class(tmp_path / "models", "Qwen2ForCausalLM", **LAYERS)
    same(merge, stacked(tmp_path, models, (0, 3), (1, 4)), tmp_path, *SHARDS)


@pytest.mark.parametrize("settings", [{}, {"dtype": "float32"}, {"out_dtype": "float16"}])
def test_inputs_of_two_dtypes(
    settings: dict[str, str], merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")
    edit_weights(models[1], lambda held: held.update({k: v.bfloat16() for k, v in held.items()}))
    change_config(models[1], dtype="bfloat16")
    recipe = write_recipe(tmp_path / "r.yaml", models, **settings)
    same(merge, recipe, tmp_path, *SHARDS)


def test_pickled_inputs(merge: Merge, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "llama")
    pickle(models[2])
    same(merge, write_recipe(tmp_path / "r.yaml", models), tmp_path, *SHARDS)


def byte_pairs(letters: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single letters."""
    known = {letter: number for number, letter in enumerate(["<unk>", *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(known, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def rows_by_token(folder: Path) -> dict[str, torch.Tensor]:
    """Both tables' rows of each token, by the folder's own tokenizer."""
    found = load_tensors(folder)
    tables = torch.cat([found["model.embed_tokens.weight"], found["lm_head.weight"]], dim=1)
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return {token: tables[row] for token, row in vocabulary.items()}


def test_each_input_is_read_once_and_one_tensor_ahead(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[str, str]] = Counter()
    written: set[str] = set()
    most = 0
    load, write = Reader.get_tensor, TensorFile.write

    def counted(self: Reader, key: str, *rest: Any, **named: Any) -> torch.Tensor | None:
        nonlocal most
        read[self.folder, key] += 1
        most = max(most, len({name for _, name in read} - written))
        return load(self, key, *rest, **named)

    def noted(self: TensorFile, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        written.add(name)

    monkeypatch.setattr(Reader, "get_tensor", counted)
    monkeypatch.setattr(TensorFile, "write", noted)
    models = saved("llama")
    assert (
        merge(recipe_of("cart", models, tmp_path), tmp_path / "out", "--workers", 1).exit_code == 0
    )
    names = load_tensors(tmp_path / "out")
    assert read == {(model, name): 1 for model in models for name in names}
    # One is written, one merged, and one is read: memory is bounded.
    assert most <= 3


def test_a_recipe_that_makes_a_tokenizer(merge: Merge, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "llama")
    for model, words in zip(models, ("abcdefgh", "abcdefghijkl", "ghijklmnopqrstu"), strict=True):
        byte_pairs(words).save_pretrained(model)
    recipe = write_recipe(
        tmp_path / "r.yaml", models, tokenizer={"source": "union", "pad_to_multiple_of": 16}
    )
    for out, options in (("out", ["--workers", 1]), ("plain", [])):
        assert merge(recipe, tmp_path / out, "--force", *SHARDS, *options).exit_code == 0
    # In which order the tokens come is mergekit's whim, another one each time.
    ours, theirs = rows_by_token(tmp_path / "out"), rows_by_token(tmp_path / "plain")
    assert ours.keys() == theirs.keys() == {"<unk>", *"abcdefghijklmnopqrstu"}
    assert all(torch.equal(ours[token], theirs[token]) for token in ours)
    assert load_tensors(tmp_path / "out")["lm_head.weight"].shape[0] == 32


def test_a_tokenizer_that_numbers_otherwise(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    base, *tuned = (shutil.copytree(it, tmp_path / f"m{n}") for n, it in enumerate(saved("llama")))
    for model in (base, *tuned):
        save_tokenizer(str(model), 64, backwards=model == tuned[0])
    change_config(base, bos_token_id=1, eos_token_id=2)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        [*map(str, tuned)],
        base_model=str(base),
        tokenizer_source=str(tuned[0]),
    )
    same(merge, recipe, tmp_path, *SHARDS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 61


def test_adapters_are_fused_first(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    base = saved("llama")[0]
    adapters = [lora(base, tmp_path / f"lora-{seed}", seed) for seed in range(3)]
    models = [f"{base}+{adapter}" for adapter in adapters]
    same(merge, write_recipe(tmp_path / "r.yaml", models), tmp_path, "--force")


def test_what_a_merge_warns_of_is_told_once(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", saved("llama"), parameters={"rank": 32})
    done = same(merge, recipe, tmp_path, *SHARDS)
    assert done.output.count("kept at least 99%") == 1


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize(
    ("method", "count", "settings", "dtype"),
    [
        ("arcee_fusion", 2, {}, torch.float32),
        ("arcee_fusion", 2, {"dtype": "bfloat16"}, torch.float32),
        ("ramplus_tl", 3, {}, torch.float32),
        ("ramplus_tl", 3, {"dtype": "float16", "out_dtype": "bfloat16"}, torch.bfloat16),
        ("sce", 3, {"dtype": "float16"}, torch.float16),
        ("cart", 3, {}, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_are_those_that_the_method_gives(
    method: str,
    count: int,
    settings: dict[str, str],
    dtype: torch.dtype,
    architecture: str,
    merge: Merge,
    halved: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    """By mergekit's plan and tensor by tensor."""
    models = halved(architecture)[:count]
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method=method, base_model=models[0], **settings
    )
    done = same(merge, recipe, tmp_path, *SHARDS, "--force")
    assert ("tensor by tensor" in done.output.splitlines()[-1]) is (architecture == "bert")
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {dtype}


def test_a_methods_dtype_may_depend_on_the_shape(merge: Merge, tmp_path: Path) -> None:
    parts = {
        "text_config": {**SIZES, "max_position_embeddings": 8},
        "vision_config": {**SIZES, "image_size": 32, "patch_size": 16},
    }
    models = save_class(tmp_path / "models", "CLIPModel", **parts)
    for model in models:
        halve(model)
    recipe = write_recipe(tmp_path / "r.yaml", models, merge_method="karcher")
    same(merge, recipe, tmp_path, "--force")
    held = load_tensors(tmp_path / "out")
    assert held["logit_scale"].dtype == torch.float32
    assert held["text_projection.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"out_dtype": "float16"}], ids=str)
def test_a_tied_first_model_beside_heads_of_their_own(
    settings: dict[str, str], merge: Merge, tmp_path: Path
) -> None:
    first, *others = save("Whisper", tmp_path)
    for seed, model in enumerate(others):
        untie(model, seed)
    recipe = write_recipe(tmp_path / "r.yaml", [first, *others], **LINEAR, **settings)
    same(merge, recipe, tmp_path, "--force")
    assert HEAD in load_tensors(tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--workers", 1)], ids=str)
def test_tables_are_cut_where_that_is_asked_for(
    options: tuple[Any, ...], merge: Merge, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama")[:2]
    save_models(tmp_path / "wider", "llama", vocab_size=120)
    models[1] = str(tmp_path / "wider" / Path(models[1]).name)
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method="linear", parameters={"weight": 1.0}
    )
    done = merge(recipe, tmp_path / "out", *options)
    assert done.exit_code == 1
    assert "the shapes of" in done.output
    done = merge(recipe, tmp_path / "out", *options, "--unsafe-truncate-embeddings")
    assert done.exit_code == 0, done.output
    assert "will be cut to the smallest" in done.output
    table = "model.embed_tokens.weight"
    first, second = (load_tensors(model)[table] for model in models)
    merged = load_tensors(tmp_path / "out")[table]
    assert torch.allclose(merged, (first + second[: len(first)]) / 2, atol=1e-6)


def test_relative_paths_mean_the_current_folder(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(saved("llama")[0]).parent)
    models = [f"./{Path(model).name}" for model in saved("llama")]
    same(merge, write_recipe(tmp_path / "r.yaml", models, base_model=models[0]), tmp_path)


def test_a_path_through_a_link_is_the_folder_that_it_leads_to(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved("llama")
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "sub")
    for number, model in enumerate(models[:2]):
        shutil.copytree(model, tmp_path / "real" / f"model-{number}")
        shutil.copytree(models[2], tmp_path / f"model-{number}")
    named = [str(tmp_path / "link" / ".." / f"model-{number}") for number in range(2)]
    same(merge, write_recipe(tmp_path / "r.yaml", named, **LINEAR), tmp_path)


def test_one_folder_in_two_spellings_stays_two_models(
    merge: Merge, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = saved("llama")
    monkeypatch.chdir(Path(models[2]).parent)
    for number, spelling in enumerate([models[2] + "/", Path(models[2]).name]):
        recipe = write_recipe(
            tmp_path / "r.yaml",
            [*models[:2], spelling],
            merge_method="task_arithmetic",
            base_model=models[2],
            parameters={"weight": 1.0, "normalize": True},
        )
        (tmp_path / str(number)).mkdir()
        same(merge, recipe, tmp_path / str(number), "--force")


def test_one_worker_takes_mergekits_threads(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    recipe = recipe_of("cart", saved("llama"), tmp_path)
    assert merge(recipe, tmp_path / "out", "--workers", 1, "-j", 2).exit_code == 0
    assert torch.get_num_threads() == 2
