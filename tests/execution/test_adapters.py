"""What a whole model made of a base and an adapter gets of each, and when it is made anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from cart_plugin.checkpoints.side_files import complete
from tests.doctor.tiny import change_config, save_models, write_recipe
from tests.execution.test_command import lora, refuses

VOCABULARY = ("tokenizer.json", "tokenizer_config.json")
TOKENS = ("special_tokens_map.json", "added_tokens.json")


def fill(folder: Path, names: Sequence[str]) -> Path:
    """Files that hold the name of their folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(folder.name)
    return folder


def sources(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize(
    ("adapters", "bases", "taken"),
    [
        (VOCABULARY, (*VOCABULARY, *TOKENS, "chat_template.jinja"), VOCABULARY),
        (("tekken.json",), ("vocab.json", "merges.txt", "spm.model"), ("tekken.json",)),
        (TOKENS, VOCABULARY, ()),
        (("chat_template.jinja",), ("chat_template.jinja", *VOCABULARY), ("chat_template.jinja",)),
        (("tokenizer_config.json",), TOKENS, ("tokenizer_config.json",)),  # of bytes, as ByT5's
        ((), VOCABULARY, ()),
    ],
)
def test_a_tokenizer_is_of_one_folder(
    adapters: Sequence[str], bases: Sequence[str], taken: Sequence[str], tmp_path: Path
) -> None:
    adapter = fill(tmp_path / "adapter", ["own.py", *adapters])
    base = fill(tmp_path / "base", ["own.py", "preprocessor_config.json", *bases])
    complete(tmp_path / "out", [adapter, base])
    found = sources(tmp_path / "out")
    assert found.pop("preprocessor_config.json") == "base"
    assert found.pop("own.py") == "adapter"
    assert {name for name, source in found.items() if source == "adapter"} == set(taken)
    rest = {name for name, source in found.items() if source == "base"}
    is_bases = set(taken) <= {"chat_template.jinja"}
    assert rest == (set(bases) - set(taken) if is_bases else set())


def test_modules_are_of_one_folder(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, module in ((base, "1_Dense"), (adapter, "1_Pooling")):
        fill(folder, [f"{module}/config.json"])
        (folder / "modules.json").write_text(f'[{{"path": "{module}"}}]')
    complete(tmp_path / "out", [adapter, base])
    assert sources(tmp_path / "out").keys() == {"modules.json", "1_Pooling/config.json"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of three adapters of one base, beside it in the folder."""
    base = save_models(tmp_path, "llama", 1)[0]
    fill(Path(base), VOCABULARY)
    adapters = [lora(base, tmp_path / f"lora-{seed}", seed) for seed in range(3)]
    return write_recipe(
        tmp_path / "r.yaml",
        [f"{base}+{adapter}" for adapter in adapters],
        merge_method="linear",
        parameters={"weight": 1.0},
    )


def test_a_changed_side_file_is_not_taken_from_the_cache(
    merge: Callable[..., Result], recipe: Path
) -> None:
    base, adapter = recipe.parent / "llama-0", recipe.parent / "lora-0"
    fill(base, ["1_Pooling/config.json"])
    (base / "modules.json").write_text('[{"path": "1_Pooling"}]')
    cache = recipe.parent / "cache"
    for number, (folder, name, made) in enumerate(
        ((adapter, "own.py", 3), (adapter, "own.py", 4), (base, "1_Pooling/config.json", 7))
    ):
        (folder / name).write_text(f"# {number}")
        out = recipe.parent / f"out-{number}"
        done = merge(recipe, out, "--force", "--lora-merge-cache", cache)
        assert done.exit_code == 0, done.output
        assert (out / name).read_text() == f"# {number}"
        assert len(list(cache.iterdir())) == made
        assert "disk needed for the fused models: " in done.output
        assert "disk needed by --lora-merge-cache" not in done.output


def test_adapters_of_a_base_that_is_no_longer_quantised(
    merge: Callable[..., Result], recipe: Path
) -> None:
    change_config(
        recipe.parent / "llama-0", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    done = merge(recipe, recipe.parent / "out", "--force")
    assert done.exit_code == 0, done.output
    assert "quantization" not in (recipe.parent / "out" / "config.json").read_text()


def test_an_adapters_folder_is_left_alone(merge: Callable[..., Result], recipe: Path) -> None:
    inside = recipe.parent / "lora-1" / "merged"
    refuses(merge(recipe, inside, "--force"), "overwrite or mix with", "lora-1")
    assert not inside.exists()
