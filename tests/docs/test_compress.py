"""The loading code of the README runs on what the command writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.readme import ROOT
from cart_plugin.cli import main
from tests.compress.models import save_tasks


def test_the_readmes_loading_code_serves_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "README.md").read_text().split("## Serve many fine-tunes from one base")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    models = save_tasks(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    names = "mistral-math,mistral-code,mistral-german"
    options = ["--rank", "32", "--names", names, "--out", "served"]
    done = CliRunner().invoke(main, ["compress", *map(str, models), *options])
    assert done.exit_code == 0, done.output

    loaded: dict[str, object] = {}
    exec(code, loaded)  # noqa: S102  (our own README)
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(models[1])
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        expected, found = (model(tokens).logits for model in (own, loaded["model"]))  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(
        AutoModelForCausalLM.from_pretrained("served/base")(tokens).logits, expected, atol=1e-2
    )
