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

from cart_plugin.compare.reads import changed
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


def heard(script: str, **environment: str) -> dict[str, Any]:
    """What a process that runs a script has read and listed."""
    text = f"""
import json
from cart_plugin.compare.reads import Reads, changed
reads = Reads()
{script}
print(json.dumps(reads.files("model", "out")))
"""
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def names(found: dict[str, Any]) -> set[str]:
    return {Path(name).name + ("/" if name.endswith("/") else "") for name in found}


def test_data_that_lies_where_temporary_files_do(folder: Path) -> None:
    """On clusters the scratch disk is both."""
    scratch = folder / "scratch"
    (scratch / "staged").mkdir(parents=True)
    (scratch / "staged" / "data.json").write_text("1")
    (folder / "work").mkdir()
    os.chdir(folder / "work")
    script = """
import os, shutil, subprocess, sys, tempfile
from pathlib import Path
scratch = Path(os.environ["TMPDIR"])
open(scratch / "staged" / "data.json").read()
with tempfile.TemporaryDirectory() as own:
    subprocess.run([sys.executable, "-c", "open('by-child', 'w')"], cwd=own, check=True)
    shutil.copy2(scratch / "staged" / "data.json", f"{own}/copied")
    for name in os.listdir(own):
        open(f"{own}/{name}").read()
    kept = shutil.copytree(own, scratch / "kept")
    open(kept / "by-child").read()
child = "import pathlib; pathlib.Path('by-child').write_text('x')"
subprocess.run([sys.executable, "-c", child], cwd=scratch, check=True)
open(scratch / "by-child").read()
os.listdir(scratch)
"""
    assert names(heard(script, TMPDIR=str(scratch))) == {"data.json"}


@pytest.mark.parametrize(
    "way",
    [
        "os.listdir('data')",
        "list(os.scandir(b'data'))",
        "glob.glob('data/*.json')",
        "list(Path('data').rglob('*.json'))",
        "list(os.walk('data'))",
        "os.chdir('data') or os.listdir()",
    ],
)
def test_a_folder_that_was_listed(way: str, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "a.json").write_text("1")
    found = heard(f"import glob, os\nfrom pathlib import Path\n{way}")
    assert names(found) == {"data/"}
    assert not changed(found)
    (folder / "data" / "__pycache__").mkdir()
    (folder / "data" / "a.json").write_text("2")  # whose content nobody has asked for
    assert not changed(found)
    (folder / "data" / "b.json").write_text("1")
    assert changed(found)
    (folder / "data" / "b.json").unlink()
    assert not changed(found)
    (folder / "data" / "a.json").rename(folder / "data" / "c.json")
    assert changed(found)


def test_folders_that_change_by_judging(folder: Path) -> None:
    """Those of results and of modules, and where the evaluator writes."""
    for name in ("out/linear/model", "model", "data", "logs", "cache/a"):
        (folder / name).mkdir(parents=True)
    (folder / "out" / "linear" / "evaluation.log").touch()
    script = """
import importlib.metadata, os, pkgutil, sys
sys.path.insert(0, os.getcwd())
import helper
try:
    import absent
except ImportError:
    importlib.metadata.entry_points(group="absent")
list(pkgutil.iter_modules())
for name in ("out", "out/linear", "out/linear/model", "model", "data", "logs", "cache"):
    os.listdir(name)
open("logs/1.txt", "w")
os.makedirs("cache/a", exist_ok=True)
os.makedirs("cache/b", exist_ok=True)
os.makedirs("data", exist_ok=True)
"""
    assert names(heard(script)) == {"data/", "helper.py"}


def test_a_folder_of_data_among_the_results(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "linear").mkdir()
    (folder / "linear" / "evaluation.log").touch()
    (folder / "out").symlink_to(folder)
    found = heard("import os\nfor name in ('.', 'data', 'linear'): os.listdir(name)")
    assert names(found) == {"data/"}


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    """Nobody knows which of the two the answer is of."""
    script = """
import json
from cart_plugin.compare.reads import Reads, changed
reads = Reads()
open("data.json").read()
open("helper.py").read()
__import__("pathlib").Path("data.json").touch()
found = reads.files("model", "out")
print(json.dumps({name[-8:]: changed({name: found[name]}) for name in found}))
"""
    os.utime(folder / "data.json", (0, 0))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"ata.json": True, "elper.py": False}
