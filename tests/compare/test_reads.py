"""Rows are judged anew when what the evaluator has read is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.tiny import write_recipe

JUDGE = """
import json
from pathlib import Path

def accuracy(folder):
    from helper import sign
    with open("calls.txt", "a") as calls:
        calls.write(folder + "\\n")
    size = Path(folder, "model.safetensors").stat().st_size
    cached = Path("cache.txt")
    cached.with_suffix(".new").write_text((cached.read_text() if cached.exists() else "") + "x")
    cached.with_suffix(".new").replace(cached)
    return {"size": sign() * size * json.load(open("data.json"))["scale"]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an evaluator that imports and reads when it is called."""
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "helper.py").write_text("def sign():\n    return 1\n")
    (tmp_path / "data.json").write_text(json.dumps({"scale": 1}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_that_the_evaluator_reads(
    folder: Path, llamas: list[str], compare: Callable[..., Any]
) -> None:
    recipe = write_recipe(folder / "recipe.yaml", llamas[:2])

    def sizes() -> list[float]:
        arguments = ["--evaluator", "judge:accuracy", "--methods", "linear"]
        done = compare(recipe, *arguments, evaluator="")
        assert done.exit_code == 0, done.output
        found = json.loads((folder / "out" / "report.json").read_text())
        return [row["metrics"]["size"]["value"] for row in found["rows"]]

    def calls() -> int:
        return len((folder / "calls.txt").read_text().splitlines())

    first = sizes()
    assert calls() == len(first) == 3
    assert sizes() == first
    assert calls() == 3  # what it writes itself does not count
    for name in ("data.json", "judge.py"):
        os.utime(folder / name)
    assert sizes() == first
    assert calls() == 3  # nor what was touched
    (folder / "data.json").write_text(json.dumps({"scale": 100}))
    assert sizes() == [100 * size for size in first]
    (folder / "helper.py").write_text("def sign():\n    return -1\n")
    os.utime(folder / "helper.py", (0, 0))  # or Python would not see it, either
    assert sizes() == [-100 * size for size in first]
    assert calls() == 9
    held = json.loads((folder / "out" / "linear" / "evaluation.json").read_text())["read"]
    assert {Path(name).name for name in held} == {"data.json", "helper.py", "judge.py"}


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    """Nobody knows which of the two the answer is of."""
    script = """
import json
from cart_plugin.compare.reads import Reads, changed
reads = Reads()
open("data.json").read()
open("helper.py").read()
__import__("pathlib").Path("data.json").touch()
found = reads.files("model")
print(json.dumps({name[-8:]: changed({name: found[name]}) for name in found}))
"""
    os.utime(folder / "data.json", (0, 0))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"ata.json": True, "elper.py": False}
