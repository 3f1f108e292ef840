"""The command: the page, the files, recipes, and one line for what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from cart_plugin.cli import main
from tests.inspect.conftest import NAMES, report, tune
from tests.support import random

Run = Callable[..., Result]


def test_the_page_says_how_far_where_how_alike_and_what_is_kept(
    run: Run, models: list[Path], base: Path
) -> None:
    text = run(*models, "--base", base).output
    assert re.search(r"math +\d+\.\d+% +~\d+ +\d+% +mlp\.", text)
    assert re.search(r"\w+ and \w+ +\d+% +-?\d\.\d\d +\d+% +\d+%", text)
    for method in ("average", "task_arithmetic, 0.3", "cart", "cart_auto", "cart_auto with base"):
        assert re.search(rf"^{method} +(\d+% +){{3}}\d+%$", text, re.MULTILINE), method
    recipe = re.search(r"recommended\n((?:  .*\n)+)", text)
    assert recipe is not None
    found = yaml.safe_load(recipe[1])
    assert found["merge_method"] == "cart_auto"
    assert found["base_model"] == str(base)
    assert [entry["model"] for entry in found["models"]] == list(map(str, models))


def test_the_recommended_recipe_is_one_that_mergekit_takes(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    run(*models, "--base", base, "--out", tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(report(tmp_path / "out")["advice"]["recipe"])
    result = CliRunner().invoke(main, ["doctor", str(recipe)])
    assert result.exit_code == 0, result.output


def test_a_recipe_is_read_for_its_models_and_base(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "merge.yaml"
    listed = [{"model": str(folder)} for folder in models]
    document = {"merge_method": "ties", "models": [*listed, {"model": str(base)}]}
    document |= {"base_model": str(base), "parameters": {"weight": 1.0, "density": 0.5}}
    recipe.write_text(yaml.safe_dump(document))
    plain = run(*models, "--base", base).output
    assert run(recipe).output == plain
    del document["merge_method"]
    recipe.write_text(yaml.safe_dump(document))
    assert run(recipe).output == plain


def test_adapters_of_a_recipe_are_read_by_their_factors(
    run: Run, adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "merge.yaml"
    listed = [{"model": f"{base}+{folder}"} for folder in adapters]
    recipe.write_text(yaml.safe_dump({"merge_method": "cart", "models": listed}))
    text = run(recipe).output
    assert re.search(r"math +\d+\.\d+% +4 +", text)
    assert "of rank 4, as of LoRA adapters" in text


def test_adapters_alone_get_the_command_that_merges_them(
    run: Run, adapters: list[Path], tmp_path: Path
) -> None:
    text = run(*adapters, "--out", tmp_path).output
    assert "```sh\nmergekit-cart merge-adapters" in (tmp_path / "report.md").read_text()
    assert "moved: the difference from the base, its norm" in text  # no share of what is not here
    assert "mergekit-cart merge-adapters" in text
    assert "--method auto --out merged" in text


def test_the_files_hold_the_same_and_nothing_from_elsewhere(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(*models, "--base", base, "--out", out)
    assert f"report: {out / 'report.html'}" in result.output
    assert {file.name for file in out.iterdir()} == {
        *("report.json", "report.md", "report.html", ".lock")
    }
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//|@import|url\(", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    drawn, found = json.loads(data[1]), report(out)
    assert drawn["models"] == list(found["models"]) == NAMES
    tensors = [record["tensor"] for record in found["records"] if record["decomposed"]]
    assert [record["tensor"] for record in drawn["records"]] == tensors
    for word in (*NAMES, found["advice"]["method"]):
        assert word in page
        assert word in (out / "report.md").read_text()


def test_names_with_signs_do_not_break_the_page(
    run: Run, models: list[Path], tmp_path: Path
) -> None:
    names = "</script><b>,a|b,[red]"
    result = run(*models, "--names", names, "--out", tmp_path / "out")
    assert "[red]" in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("</script>") == 2
    assert "<b>" not in page
    assert "a\\|b" in (tmp_path / "out" / "report.md").read_text()


def test_names_of_weights_break_where_their_parts_end(
    run: Run, models: list[Path], tmp_path: Path
) -> None:
    run(*models, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"<td>model\.<wbr>layers\.<wbr>\d\.<wbr>\w+\.<wbr>", page)


def test_a_merged_model_is_a_line_of_its_own(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = run(*models, "--base", base, "--merged", models[0], "--out", out).output
    assert re.search(r"^merged +100%", text, re.MULTILINE)
    assert "most lost by merged" in text
    assert report(out)["merged"] == str(models[0])


def test_without_a_base_there_is_no_uncentred_curve_and_the_page_says_so(
    run: Run, models: list[Path], tmp_path: Path
) -> None:
    text = run(*models, "--out", tmp_path / "out").output
    assert "the difference from the average" in text
    assert "with the base model (--base)" in text
    assert "no base model was named: R and I" in text
    assert "no base model was named" in (tmp_path / "out" / "report.html").read_text()
    found = report(tmp_path / "out")
    assert found["curves"]["from_base"] is None
    assert found["curves"]["centred"] is not None
    assert "cart_auto with base" not in found["methods"]


def test_who_interrupts_a_run_is_told_that_it_goes_on(
    run: Run, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cart_plugin.inspect.run.inspect_models", interrupted)
    found = run(*models, "--out", tmp_path / "out")
    assert found.exit_code == 1
    assert "interrupted: the same command goes on" in found.output
    assert "goes on" not in run(*models).output  # nothing is kept without a folder


def test_an_edited_model_is_measured_anew(run: Run, tmp_path: Path) -> None:
    """Also where the pages that stand for a weight do not show it."""
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        weight = random(256, 256, seed=seed)
        save_file({"model.layers.0.mlp.up_proj.weight": weight}, folder / "model.safetensors")
    out = tmp_path / "out"

    def moved() -> list[float]:
        run(*folders, "--out", out)
        return list(report(out)["records"][0]["moved"])

    before = moved()
    assert moved() == before
    weight[5:15] = 0  # between the first page, 4 rows, and the second, from row 16 on
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, folders[2] / "model.safetensors")
    assert moved()[2] != pytest.approx(before[2], rel=1e-3)


def test_nearly_equal_models_are_told(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    twin = tune(models[0], tmp_path / "math-v2", seed=7, scale=0.002)
    text = run(*models, twin, "--base", base).output
    assert re.search(r"^math and math-v2 +\d% ", text, re.MULTILINE)
    assert re.search(r"- math and math-v2 differ by \d% of what they moved", text)


def test_what_is_wrong_is_one_line(run: Run, models: list[Path], tmp_path: Path) -> None:
    for arguments in (
        *([models[0]], [*models, "--base", tmp_path / "none"], ["none.yaml"]),
        ["none.yaml", models[0]],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert len(result.output.strip().splitlines()) == 1, result.output


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"merge_method": "linear", "slices": []}, "slices"),
        ([1, 2], "not a recipe"),
        ({"merge_method": "linear", "models": 3}, "models"),
    ],
)
def test_recipes_that_are_none_are_refused(
    run: Run, tmp_path: Path, document: object, message: str
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    result = run(tmp_path / "r.yaml")
    assert result.exit_code == 1
    assert message in result.output


def test_slices_are_refused(run: Run, models: list[Path], tmp_path: Path) -> None:
    sources = [{"model": str(folder), "layer_range": [0, 1]} for folder in models]
    document = {"merge_method": "linear", "slices": [{"sources": sources}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    assert "inspect takes whole models" in run(tmp_path / "r.yaml").output


def test_a_model_that_outweighs_the_others_is_told(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    large = tune(base, tmp_path / "large", seed=3, scale=0.4)
    assert "large moved" in run(*models[:2], large, "--base", base).output
    still = shutil.copytree(base, tmp_path / "still")
    assert "still did not move" in run(*models[:2], still, "--base", base).output


def test_many_models_have_a_page_no_wider_and_files_with_all(
    run: Run, base: Path, tmp_path: Path
) -> None:
    models = [tune(base, tmp_path / f"model{seed}", seed) for seed in range(7)]
    text = run(*models, "--base", base, "--out", tmp_path / "out").output
    assert re.search(r"^kept by +mean +least +of +lost$", text, re.MULTILINE)
    assert re.search(r"^cart_auto +\d+% +\d+% +model\d +\d+%$", text, re.MULTILINE)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| kept by | model0 | model1 |" in markdown
    assert "merged by cart_auto around their average" in text


def test_experts_stored_one_by_one_are_of_one_cell(run: Run, tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        experts = {
            f"layers.0.experts.{number}.up.weight": random(12, 16, seed=10 * seed + number)
            for number in range(2)
        }
        folders.append(tmp_path / f"{seed}.safetensors")
        save_file(experts, folders[-1])
    run(*folders, "--out", tmp_path / "out")
    places = {(entry["layer"], entry["module"]) for entry in report(tmp_path / "out")["records"]}
    assert places == {(0, "experts.up")}


def test_nothing_has_no_sign(run: Run, models: list[Path], base: Path) -> None:
    text = run(*models, "--base", base, "--merged", base).output
    assert re.search(r"^merged +0% +0% +0% +100%$", text, re.MULTILINE)
    assert "-0%" not in text
    assert "-0.00" not in text


def test_nor_has_it_in_the_drawing(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    run(*models, "--base", base, "--out", tmp_path)
    found = report(tmp_path)["pairs"]
    assert any(-0.005 < pair["cosine"] < 0 for pair in found)  # or it tells nothing
    text = (tmp_path / "report.html").read_text()
    drawn = re.findall(r'"cosine": (-?[0-9.]+)', text)
    assert len(drawn) == len(found)
    assert all(re.search("[1-9]", value) for value in drawn if value.startswith("-"))
