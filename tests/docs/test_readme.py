"""The front page is short, and the pages say what the result files and the code say."""

import re

import pytest

from benchmarks.readme import ROOT, filled
from tests.docs.pages import FILLED

README = FILLED["README.md"]


def test_the_front_page_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.encode()) <= 14_000


@pytest.mark.parametrize("page", [page for page in FILLED if not page.startswith("bench")])
def test_lines_fit_a_terminal(page: str) -> None:
    too_long = [
        line
        for line in FILLED[page].splitlines()
        # The guide's tables may be wide, and results bring their own width.
        if len(line) > 160 and (page == "README.md" or not line.startswith("|"))
    ]
    assert not too_long


@pytest.mark.parametrize("page", FILLED)
def test_tables_are_those_of_the_result_files(page: str) -> None:
    assert filled(FILLED[page]) == FILLED[page], "run `make readme`"


def test_the_front_page_shows_a_result() -> None:
    table = README.split("<!-- from benchmarks/results/demo/table.md -->")[1]
    assert "| **cart_auto** |" in table.split("<!-- end -->")[0]


def test_a_changed_result_changes_the_text(tmp_path) -> None:
    (tmp_path / "table.md").write_text("| new |\n")
    text = "a\n<!-- from table.md -->\n| old |\n<!-- end -->\nb"
    assert filled(text, tmp_path) == "a\n<!-- from table.md -->\n\n| new |\n\n<!-- end -->\nb"


def test_marks_in_code_are_text() -> None:
    text = "```text\n<!-- from nowhere.md -->\n<!-- end -->\n```\n"
    assert filled(text) == text


def test_prose_of_results_is_wrapped_and_tables_are_not(tmp_path) -> None:
    row = "| " + "wide " * 50 + "|"
    (tmp_path / "table.md").write_text("word " * 100 + "\n\n" + row + "\n")
    lines = filled("<!-- from table.md -->\n<!-- end -->", tmp_path).splitlines()
    assert row in lines
    assert max(len(line) for line in lines if line != row) <= 125


def test_the_table_of_parameters_is_the_methods() -> None:
    from cart_plugin.mergekit import SPEC

    table = FILLED["docs/choosing.md"].split("## Parameters")[1].split("\n\n")[1]
    described = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(described) == sorted(parameter.name for parameter in SPEC.parameters)


def test_the_rule_of_auto_is_the_one_in_the_code() -> None:
    from cart_plugin.linalg import svd

    text = " ".join(FILLED["docs/how-it-works.md"].split())
    assert "at most an eighth of the full rank" in text
    assert svd._FAST_SHARE == 1 / 8
    assert f"with a short side of {svd._FAST_SIDE} or more" in text
    assert f"on GPUs with a short side of {svd._FAST_SIDE_THERE} or more" in text
    assert "below six times that" in text
    assert svd._FAST_ASPECT == 6
    assert f"Above {svd._GRAM_SHARE:.0%}".replace("%", " %") in text


def test_the_methods_of_fusion_bench_are_those_that_come_along() -> None:
    folder = ROOT / "cart_plugin" / "fusion_bench" / "conf" / "method"
    shipped = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
    table = FILLED["docs/fusion-bench.md"].split("## Methods")[1].split("\n\n")[1]
    named = {
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(cart[\w/-]*)`", row)
    }
    assert named == shipped


def test_the_rooms_of_the_house_are_those_of_the_package() -> None:
    table = FILLED["docs/development.md"].split("## The house")[1].split("\n\n")[2]
    named = {
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    here = ROOT / "cart_plugin"
    rooms = {path.parent.name for path in here.glob("*/__init__.py")}
    modules = {path.stem for path in here.glob("*.py")} - {"__init__", "__main__"}
    assert named == rooms | modules
