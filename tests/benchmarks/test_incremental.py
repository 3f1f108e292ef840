"""What tells whether measured figures still hold."""

import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from benchmarks.common import incremental

PLUGIN = Path(__file__).parents[2] / "cart_plugin"


def test_all_that_a_merge_imports_decides() -> None:
    program = (
        "import sys, cart_plugin.mergekit; "
        "print(*(name for name in sys.modules if name.startswith('cart_plugin.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PLUGIN.parent,
    )
    imported = {name.split(".")[1] + ".py" for name in done.stdout.split()}
    without_numbers = {"errors.py", "autoload.py"}
    compression = {"indexing.py"}  # of the vision suite only
    assert imported - without_numbers == set(incremental.DECISIVE) - compression


@pytest.mark.parametrize(("name", "counts"), [("krylov.py", True), ("cli/doctor.py", False)])
def test_only_what_decides_numbers_changes_the_digest(
    name: str, counts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = shutil.copytree(PLUGIN, tmp_path / "cart_plugin")
    spec = ModuleSpec("cart_plugin", None, origin=str(copy / "__init__.py"))
    monkeypatch.setattr(incremental, "find_spec", lambda _: spec)
    before = incremental.plugin_digest()
    (copy / name).write_text((copy / name).read_text() + "# changed")
    assert (incremental.plugin_digest() != before) == counts


def test_a_missing_plugin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incremental, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="make venv"):
        incremental.plugin_digest()
