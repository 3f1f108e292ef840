"""`mergekit-cart merge-adapters`, by its options and by recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cart_plugin import CartError
from cart_plugin.adapters import merge_adapters
from cart_plugin.adapters.recipes import read_recipe
from cart_plugin.cli import main
from tests.adapters.lora import change_tensors, config_of, farthest, state, tensors


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(main, ["merge-adapters", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def write(file: Path, recipe: Any) -> Path:
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return file


def test_what_it_prints(trio: list[Path], tmp_path: Path) -> None:
    done = run(*trio, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == [
        "adapter",
        "weight",
        "rank",
        "kept",
        "error",
        "kept",
        "at",
        "rank",
        "12",
    ]
    assert [line.split()[:3] for line in lines[1:4]] == [
        [name, "0.333", "4"] for name in ("math", "code", "german")
    ]
    assert "modules that keep least" in done.output
    assert lines[-2].startswith(
        "one adapter of rank 4 of 12, which would lose nothing (--rank full)"
    )
    assert lines[-2].endswith(f"{tmp_path / 'out'} (also report.json)")
    assert lines[-1] == (
        "loaded by PEFT and, if they run LoRA of the base, by vLLM (--max-lora-rank 8), "
        "SGLang (--max-lora-rank 4), llama.cpp"
    )


def test_every_option_arrives(trio: list[Path], tmp_path: Path) -> None:
    done = run(
        *trio, "--out", tmp_path / "out", "--method", "cart", "--rank", "6", "--lambda", "1.5",
        "--keep", "2", "--weights", "1, 2,1", "--names", "a,b,c", "--dtype", "bfloat16",
        "--base", "org/base",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    merge_adapters(
        trio, tmp_path / "same", method="cart", rank=6, lambda_=1.5, keep=2, weights=[1, 2, 1],
        names=["a", "b", "c"], dtype="bfloat16", base="org/base",
    )  # fmt: skip
    assert farthest(tensors(tmp_path / "out"), tensors(tmp_path / "same")) == 0
    assert config_of(tmp_path / "out") == config_of(tmp_path / "same")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "org/base"
    assert [line.split()[0] for line in done.output.splitlines()[1:4]] == ["a", "b", "c"]
    done = run(*trio, "--out", tmp_path / "ratio", "--rank-ratio", "0.1", "--rank", "full")
    assert done.exit_code == 0, done.output
    merge_adapters(trio, tmp_path / "ratio-too", rank_ratio=0.1, rank="full")
    assert farthest(tensors(tmp_path / "ratio"), tensors(tmp_path / "ratio-too")) == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--rank", "x"], "'x' is neither a whole number nor full"),
        (["--rank", "-1"], "rank must be a positive whole number"),
        (["--weights", "1,a,2"], "no list of numbers"),
        (["--weights", "1,2"], "3 adapters but 2 weights"),
        (["--method", "ties"], "'ties' is not one of"),
        (["--lambda", "2"], "auto has none"),
    ],
)
def test_bad_options(options: list[str], part: str, trio: list[Path], tmp_path: Path) -> None:
    done = run(*trio, "--out", tmp_path / "out", *options)
    assert done.exit_code != 0
    assert part in done.output
    assert not list(tmp_path.iterdir())


def test_a_recipe_has_the_same_words(trio: list[Path], tmp_path: Path) -> None:
    recipe = {
        "adapters": [
            {"adapter": str(trio[0]), "weight": 2, "name": "sums"},
            {"adapter": str(trio[1]), "name": "programs"},
            {"adapter": str(trio[2]), "name": "deutsch"},
        ],
        "method": "cart",
        "rank": "full",
        "lambda": 1.2,
        "keep": 3,
        "dtype": "float16",
        "base": "org/base",
    }
    done = run(write(tmp_path / "r.yaml", recipe), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "programs" in done.output
    merge_adapters(
        trio, tmp_path / "same", method="cart", rank="full", lambda_=1.2, keep=3, dtype="float16",
        base="org/base", weights=[2, 1, 1], names=["sums", "programs", "deutsch"],
    )  # fmt: skip
    assert farthest(tensors(tmp_path / "out"), tensors(tmp_path / "same")) == 0


def test_options_go_before_a_recipes(trio: list[Path], tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yml", {"adapters": list(map(str, trio)), "rank": 2})
    done = run(recipe, "--out", tmp_path / "out", "--rank", "3")
    assert done.exit_code == 0, done.output
    assert config_of(tmp_path / "out")["r"] == 3


def test_an_options_rank_rule_goes_before_a_recipes(trio: list[Path], tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yml", {"adapters": list(map(str, trio)), "keep": 1})
    done = run(recipe, "--out", tmp_path / "out", "--rank-ratio", "0.1", "--rank", "full")
    assert done.exit_code == 0, done.output
    merge_adapters(trio, tmp_path / "same", rank_ratio=0.1, rank="full")
    assert farthest(tensors(tmp_path / "out"), tensors(tmp_path / "same")) == 0


def test_some_adapters_of_a_recipe_have_names(trio: list[Path], tmp_path: Path) -> None:
    first, *others = map(str, trio)
    recipe = write(tmp_path / "r.yml", {"adapters": [{"adapter": first, "name": "sums"}, *others]})
    done = run(recipe, "--out", tmp_path / "out")
    assert [line.split()[0] for line in done.output.splitlines()[1:4]] == ["sums", "code", "german"]
    done = run(recipe, "--out", tmp_path / "all", "--names", "a,b,c")
    assert [line.split()[0] for line in done.output.splitlines()[1:4]] == ["a", "b", "c"]


def test_a_rank_beyond_need_is_told(trio: list[Path], tmp_path: Path) -> None:
    done = run(*trio, "--out", tmp_path / "out", "--rank", "20")
    assert "rank 20 is more than the 12 that lose nothing" in " ".join(done.output.split())
    assert config_of(tmp_path / "out")["r"] == 20


def test_an_adapter_of_no_weight_takes_no_rank(
    base: Path, trio: list[Path], tmp_path: Path
) -> None:
    done = run(*trio, "--out", tmp_path / "out", "--weights", "1,0,1", "--rank", "full")
    assert done.exit_code == 0, done.output
    assert config_of(tmp_path / "out")["r"] == 8
    assert done.output.splitlines()[2].split() == ["code", "0", "4", "-", "-"]
    merge_adapters([trio[0], trio[2]], tmp_path / "two", rank="full")
    merged, two = (state(base, tmp_path / name) for name in ("out", "two"))
    assert farthest(merged, two) < 1e-6


def test_a_recipe_with_nothing_but_folders(trio: list[Path], tmp_path: Path) -> None:
    found = read_recipe(write(tmp_path / "r.yaml", {"adapters": list(map(str, trio))}), {})
    assert found == {"adapters": list(map(str, trio))}


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("adapters: [", "cannot be read: ParserError"),
        ({"models": []}, "has no list of adapters"),
        ("- a", "has no list of adapters"),
        ({"adapters": ["a"], "merge_method": "ties"}, "'merge_method' means nothing here"),
        ({"adapters": [{"model": "a"}]}, "names no adapter"),
        ({"adapters": [{"adapter": "a", "lambda": 2}]}, "a: 'lambda' means nothing here"),
        ({"adapters": ["a", "b"], "weights": [1, 2]}, "give each adapter its `weight:`"),
        ({"adapters": ["a", "b"], "names": ["x", "y"]}, "give each adapter its `name:`"),
        ({"adapters": [{"adapter": "a", "weight": "x"}, "b"]}, "weights must be finite numbers"),
        ({"adapters": [{"adapter": "a", "name": 3}]}, "must be a word, got 3"),
        ({"adapters": []}, "at least one adapter"),
        ({"adapters": ["a"], "rank": "x"}, "rank must be a positive whole number or 'full'"),
        ({"adapters": ["a"], "lambda": "auto", "method": "cart"}, "lambda must be a number"),
        ({"adapters": ["a"], "rank_ratio": 0.1, "keep": 2}, "are two rules"),
    ],
)
def test_bad_recipes(recipe: Any, part: str, trio: list[Path], tmp_path: Path) -> None:
    for name, folder in zip("ab", trio, strict=False):
        (tmp_path / name).symlink_to(folder)
        if not isinstance(recipe, str):
            recipe = yaml.safe_load(
                yaml.safe_dump(recipe).replace(f" {name}\n", f" {tmp_path / name}\n")
            )
    file = write(tmp_path / "r.yaml", recipe)
    done = run(file, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert part in done.output.replace(str(tmp_path / "a"), "a"), done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_called_like_a_recipe(own_trio: list[Path], tmp_path: Path) -> None:
    folder = own_trio[0].rename(tmp_path / "math.yaml")
    done = run(folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_numbers_that_mean_nothing_are_not_shown(own_trio: list[Path], tmp_path: Path) -> None:
    change_tensors(own_trio[0], lambda held: [held[k].mul_(1e-9) for k in held if "lora_B" in k])
    done = run(*own_trio, "--out", tmp_path / "out")
    assert "> 1000%" in done.output
    assert "math changes next to nothing" in done.output


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CartError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml", {})
