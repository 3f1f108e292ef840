"""`mergekit-cart compare` asked for what it cannot do, and what it does of that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from cart_plugin import CartError
from cart_plugin.compare.judge import figures
from cart_plugin.compare.steps import needed_bytes
from tests.compare.helpers import recipe_for, rows
from tests.doctor.tiny import save_models


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


def test_a_parameter_that_no_method_has_is_refused(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    parameters = {"rank_rati": 0.3, "density": 0.5}  # the second is of another method
    done = compare(recipe_for(llamas, tmp_path / "mine.yaml", parameters=parameters))
    assert done.exit_code == 1
    assert "parameters.rank_rati: no method has such a parameter; did you mean rank_ratio?" in (
        " ".join(done.output.split())
    )


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


def test_folders_to_judge_are_models_and_named_once(
    llamas: list[str], compare: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(llamas[:3], tmp_path / "mine.yaml")
    done = compare(recipe, "--also", str(tmp_path))
    assert "is no model's folder: it has no config.json" in " ".join(done.output.split())
    done = compare(recipe, "--also", llamas[3], "--also", f"{llamas[3]}/")
    assert "is given twice" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


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
    mapping: Any = {"path": llamas[0]}
    wrong = recipe_for([*llamas, mapping], tmp_path / "wrong.yaml")
    assert "models.3.model.model: Field required" in line(file=wrong)
    (tmp_path / "math@v2").mkdir()
    split = recipe_for([*llamas, f"{tmp_path}/math@v2"], tmp_path / "split.yaml")
    assert "mergekit reads `@` in it as the sign before a revision" in line(file=split)
    assert "did you mean cart?" in line("--methods", "crat")
    assert "has no parameter 'density'" in line("--grid", "cart.density=0.1,0.2")
    assert "either --tasks" in line("--tasks", "arc_easy")
    assert "either --tasks" in line(evaluator="")
    assert "option of lm-eval" in line("--limit", "3")
    assert "cannot be found" in line(evaluator="absent")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    assert "free" in line()
    assert not (tmp_path / "out" / "report.json").exists()


def test_options_of_lm_eval_are_passed_on_zero_too() -> None:
    from cart_plugin.compare.request import evaluator_request

    options = {"num_fewshot": 0, "limit": None, "apply_chat_template": False, "dtype": "float32"}
    request = evaluator_request("arc_easy, gsm8k", None, options)
    assert request["tasks"] == ["arc_easy", "gsm8k"]
    assert request["options"] == {"num_fewshot": 0}
    assert request["model_args"] == {"dtype": "float32"}
