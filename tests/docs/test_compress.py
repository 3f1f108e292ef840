"""The loading code of the guide runs on what the command writes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cart_plugin.cli import main
from tests.compress.models import save_tasks
from tests.docs.pages import FILLED, blocks


def test_the_guides_loading_code_serves_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_peft, by_us, _ = blocks(FILLED["docs/adapters.md"], "python")
    models = save_tasks(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    names = "math,code,german"
    options = ["--rank", "32", "--names", names, "--out", "served"]
    done = CliRunner().invoke(main, ["compress", *map(str, models), *options])
    assert done.exit_code == 0, done.output

    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(models[1])
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        expected = own(tokens).logits
        for code in (by_peft, by_us):
            loaded: dict[str, Any] = {}
            exec(code, loaded)  # noqa: S102  (our own page)
            assert torch.allclose(loaded["model"](tokens).logits, expected, atol=1e-3)
    assert not torch.allclose(
        AutoModelForCausalLM.from_pretrained("served/base")(tokens).logits, expected, atol=1e-2
    )


def test_the_guides_last_line_is_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = FILLED["docs/adapters.md"]
    (line,) = [line for line in page.splitlines() if "--layout servers --rank" in line]
    (expected,) = [text.strip() for text in blocks(page, "text") if text.startswith("loaded by")]
    models = save_tasks(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for folder, name in zip(models, ("math", "code", "german"), strict=True):
        folder.rename(tmp_path / "models" / name)
    done = CliRunner().invoke(main, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == expected
