"""The suite's table and plots from made-up results."""

import pytest

from benchmarks.vision.plots import save_plots
from benchmarks.vision.report import markdown


def row(key, title, mean, **more):
    values = [{"a": mean or 0, "b": (mean or 0) - 0.1 * seed} for seed in (0, 1)]
    cases = [{"accuracy": accuracy, "seconds": 1.0} for accuracy in values]
    return {
        "key": key,
        "title": title,
        "setting": {"scaling_factor": 0.3},
        "tuned": True,
        "data": "",
        "keeps": "",
        "commands": ["fusion_bench"] * 2,
        "seeds": cases,
        "mean": mean,
        "standard_error": 0.02,
        "seconds": 1.0,
    } | more


@pytest.fixture
def result():
    points = [
        {"rank_ratio": ratio, "scaling_factor": scale, "mean": ratio * scale}
        for ratio in (0.1, 0.2)
        for scale in (1.0, 2.0)
    ]
    return {
        "tasks": {"a": "Task A", "b": "Task B"},
        "seeds": [0, 1],
        "images": {"validation": 3, "test": 5},
        "rows": [
            row("pretrained", "pretrained", 0.1, tuned=False),
            row("individual", "individual", 0.9, keeps="a model a task", tuned=False),
            row("average", "simple average", 0.4, tuned=False),
            row("cart", "CART", 0.6),
            row("regmean", "RegMean", 0.5, data="images"),
            row("emr", "EMR", 0.8, keeps="a mask a task"),
            row("later", "fails on the test split", None, seeds=[{"error": "E"}], seconds=None),
        ],
        "failed": {"No method": "ValueError: no"},
        "curves": {
            "rank_and_lambda": points,
            "by_tasks": {"individual": [[2, 0.9], [3, 0.9]], "CART": [[2, 0.8], [3, 0.7]]},
            "indexing": [{"rank_ratio": 0.01, "share": 0.2, "mean": 0.8}],
        },
        "conditions": {},
        "measured": [{"cart_plugin": "0.1.0", "commit": "abc", "date": "2026-01-01"}],
    }


def test_the_table_marks_the_best_single_model_and_says_what_the_others_need(result):
    text = markdown(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| method | Task A | Task B | mean | of individual | merge s |")
    assert {line.count("|") for line in lines} == {9}
    assert len(lines) == 2 + 6
    cart = next(line for line in lines if "CART" in line)
    assert cart.startswith("| **CART** | **60.0** | **55.0** | **60.0 ± 2.0** | **67 %** |")
    assert "scaling_factor 0.3" in cart
    assert next(line for line in lines if "simple average" in line).endswith("| - |")
    assert "a mask a task" in next(line for line in lines if "EMR" in line)
    assert "- No method: `ValueError: no`" in text


def test_every_plot_is_drawn_from_the_results(result, tmp_path):
    save_plots(result, tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        *("methods.png", "radar.png", "rank_and_lambda.png", "number_of_tasks.png"),
        "indexing.png",
    }


def test_without_curves_their_plots_are_left_out(result, tmp_path):
    save_plots(result | {"curves": {}}, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"methods.png", "radar.png"}
