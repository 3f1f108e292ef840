"""Recipes as people write them: nothing of them is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cart_plugin.checkpoints.recipes import read, read_all
from cart_plugin.cli import main
from cart_plugin.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("parameters: {a: 1}\ndtype: float32\nparameters: {b: 2}\n", "1 and 3"),
        ("models:\n- model: a\n  'model': b\n", "2 and 3"),
        ("---\na: 1\n---\nb:\n  1: x\n  2: y\n  1: z\n", "5 and 7"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, lines: str) -> None:
    with pytest.raises(CheckpointError, match=f"is written twice in one mapping, in lines {lines}"):
        read_all(text)


def test_keys_of_other_mappings_and_of_merged_ones_are_no_doubles() -> None:
    text = "x: {y: &a {<<: {k: 3, j: 1}, k: 1}}\nc: {<<: *a, k: 2}\nd: {<<: *a, <<: {q: 1}}\n"
    own = {"k": 1, "j": 1}
    assert read(text) == {"x": {"y": own}, "c": {**own, "k": 2}, "d": {**own, "q": 1}}
    assert read("'1': a\n1: b\n") == {"1": "a", 1: "b"}


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("merge", "out"),
        ("inspect",),
        ("compare", "--evaluator", "os:getcwd", "--out", "out"),
        ("merge-adapters", "--out", "out"),
    ],
    ids=" ".join,
)
def test_all_commands_that_read_recipes_refuse_doubles(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cart_plugin.doctor.environment.check_environment", lambda show: True)
    file = Path("r.yaml")
    file.write_text("models: []\nadapters: []\nparameters: {a: 1}\nparameters: {b: 1}\n")
    name, *others = command
    done = CliRunner().invoke(main, [name, str(file), *others])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert "'parameters' is written twice in one mapping, in lines 3 and 4" in done.output
    assert not Path("out").exists()
