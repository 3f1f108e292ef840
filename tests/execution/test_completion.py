"""What belongs to a model beside its weights comes along, whatever it is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from click.testing import Result
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.side_files import check_modules, complete
from cart_plugin.errors import CheckpointError
from cart_plugin.execution.completion import add_side_files
from tests.doctor.tiny import change_config, save_model, save_tokenizer, write_recipe


def added(donor: Path, out: Path) -> set[str]:
    """The files that a merge's folder gets of a donor's."""
    out.mkdir()
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": [{"model": str(donor)}]}
    )
    add_side_files(out, donor, config, MergeOptions())
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def fill(folder: Path, *names: str, text: str = "{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_code_and_odd_vocabularies_come_along_but_weights_and_records_do_not(
    tmp_path: Path,
) -> None:
    own = {"config.json", "modeling_own.py", "tokenizer.model.v3", "preprocessor_config.json"}
    own |= {"qwen.tiktoken", "bpe_simple_vocab_16e6.txt.gz", "vocab.pt.txt"}
    others = {"model.safetensors", "model.safetensors.index.json", "README.md", "optimizer.pt"}
    donor = fill(tmp_path / "donor", *own, *others)
    assert added(donor, tmp_path / "out") == own


@pytest.mark.parametrize(
    "name",
    [
        *("model.gguf", "model-Q4_K_M.GGUF", "model.gguf.part1of2", "tf_model.h5"),
        *("flax_model.msgpack", "rust_model.ot", "model.onnx", "model.onnx_data", "model.npz"),
        *("model.tflite", "model.mlmodel", "model.pkl", "openvino_model.xml", "model.tar.gz"),
        *("bert_model.ckpt.data-00000-of-00001", "tf_model.h5.index.json", ".cache", ".gitignore"),
    ],
)
def test_weights_of_other_programs_would_be_the_unmerged_donors(name: str, tmp_path: Path) -> None:
    donor = fill(tmp_path / "donor", "tokenizer.json", name)
    assert added(donor, tmp_path / "out") == {"tokenizer.json"}


def modules(folder: Path, *paths: object, weights: str = "") -> Path:
    listed = [{"idx": number, "path": path} for number, path in enumerate(paths)]
    fill(folder, "modules.json", text=json.dumps(listed))
    fill(folder, "1_Pooling/config.json", "2_Router/query/config.json", "onnx/config.json")
    fill(folder, "2_Router/model.onnx")
    if weights:
        fill(folder, "2_Router/query/model.safetensors", text=weights)
    return folder


def test_the_folders_of_modules_json_come_along(tmp_path: Path) -> None:
    listed = ("", "1_Pooling", "2_Router", "3_Normalize", "../out", str(tmp_path))
    donor = modules(tmp_path / "donor", *listed, weights="w")
    own = {"modules.json", "1_Pooling/config.json", "2_Router/query/config.json"}
    own |= {"2_Router/query/model.safetensors"}
    assert added(donor, tmp_path / "out") == own
    complete(tmp_path / "fused", [donor])
    assert added(tmp_path / "fused", tmp_path / "again") == own
    (donor / "modules.json").write_text("[1]")
    assert added(donor, tmp_path / "broken") == {"modules.json"}


def test_weights_of_modules_must_be_all_models(tmp_path: Path) -> None:
    paths = ("1_Pooling", "2_Router")
    donor, same, other, none = (
        modules(tmp_path / f"m{number}", *paths, weights=weights)
        for number, weights in enumerate(("w", "w", "v", ""))
    )
    check_modules(donor, [donor, same])
    check_modules(none, [donor, none])  # its own modules need none
    for model in (other, none):
        with pytest.raises(CheckpointError, match=f"query/model.safetensors.*{model}") as error:
            check_modules(donor, [donor, same, model])
        assert "modules.json out of" in str(error.value)


def test_a_merge_refuses_modules_of_one_model(
    merge: Callable[..., Result], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    donor, *others = saved("llama")
    own = modules(shutil.copytree(donor, tmp_path / "own"), "2_Router", weights="w")
    recipe = write_recipe(tmp_path / "r.yaml", [str(own), *others])
    done = merge(recipe, tmp_path / "out", "--force")
    assert done.exit_code == 1
    assert "2_Router/query/model.safetensors there is not what" in done.output
    assert not (tmp_path / "out").exists()


def spoken(saved: Callable[..., list[str]], folder: Path) -> list[str]:
    """A base and two fine-tunes, the first of which numbers its tokens the other way round."""
    models = [
        str(shutil.copytree(model, folder / f"m{n}")) for n, model in enumerate(saved("llama"))
    ]
    for model in models:
        save_tokenizer(model, 64, backwards=model == models[1])
    settings = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    change_config(models[0], **settings)
    (Path(models[0]) / "generation_config.json").write_text(json.dumps(settings))
    return models


def test_tokens_have_the_numbers_of_the_new_tokenizer(
    merge: Callable[..., Result], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    base, *tuned = spoken(saved, tmp_path)
    recipe = write_recipe(
        tmp_path / "r.yaml", tuned, base_model=base, tokenizer_source=tuned[0],
        merge_method="cart_auto",
    )  # fmt: skip
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "mergekit-yaml keeps" not in done.output
    expected = {"bos_token_id": 62, "eos_token_id": [61, 58], "pad_token_id": 63}
    for name in ("config.json", "generation_config.json"):
        held = json.loads((tmp_path / "out" / name).read_text())
        assert {key: held[key] for key in expected} == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (62, 61)


def test_a_padding_token_that_is_gone(
    merge: Callable[..., Result], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    tuned = spoken(saved, tmp_path)
    base = str(save_model(tmp_path / "base", "llama", 9, vocab_size=66, pad_token_id=65))
    save_tokenizer(base, 64, added=2)
    recipe = write_recipe(tmp_path / "r.yaml", tuned, base_model=base, tokenizer_source=tuned[0])
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id is None
    assert model.config.vocab_size == 64


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_a_result_is_not_called_quantised(
    method: str, merge: Callable[..., Result], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    donor = str(shutil.copytree(saved("llama")[0], tmp_path / "donor"))
    change_config(donor, quantization_config={"quant_method": method, "bits": 4})
    recipe = write_recipe(tmp_path / "r.yaml", [donor, *saved("llama")[1:]], dtype="bfloat16")
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text() + done.output
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
