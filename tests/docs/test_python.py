"""The pages' Python runs, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cart_plugin.cli import main
from tests.compress.models import answer, load, save_tasks
from tests.docs.pages import FILLED, all_blocks, blocks


def run(page: str, **names: Any) -> dict[str, Any]:
    """The names that a page's blocks, one after another, leave behind."""
    for number, code in enumerate(blocks(FILLED[page], "python")):
        exec(compile(code, f"{page} {number}", "exec"), names)  # noqa: S102  (our own pages)
    return names


def matrices() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"layer.weight": torch.randn(16, 24, generator=generator)} for _ in range(3)]


def test_how_it_works() -> None:
    states = zip(("math_state", "code_state", "german_state"), matrices(), strict=True)
    found = run("docs/how-it-works.md", **dict(states))
    assert found["merged"]["layer.weight"].shape == (16, 24)
    assert found["factors"].S.shape == (8,)


def test_inspecting() -> None:
    states = dict(
        zip(("math_state", "code_state", "german_state", "base_state"), _four(), strict=True)
    )
    found = run("docs/inspecting.md", **states)
    assert {row["model"] for row in found["rows"]} == {"math", "code", "german"}
    assert found["worst"]["tensor"] == "layer.weight"


def _four() -> list[dict[str, torch.Tensor]]:
    return [*matrices(), {"layer.weight": torch.zeros(16, 24)}]


def test_fusion_bench() -> None:
    pytest.importorskip("fusion_bench")
    models = {}
    for name, state in zip(("math", "code", "german"), matrices(), strict=True):
        models[f"{name}_model"] = torch.nn.Linear(24, 16, bias=False)
        models[f"{name}_model"].load_state_dict({"weight": state["layer.weight"]})
    found = run("docs/fusion-bench.md", **models)
    mean = torch.stack([model.weight for model in models.values()]).mean(0)
    assert not torch.allclose(found["merged"].weight, mean, atol=1e-3)


def test_comparing_judges_a_model(here: Path) -> None:
    likelihood: Callable[[str], dict[str, float]] = run("docs/comparing.md")["likelihood"]
    found = likelihood("models/math")
    assert set(found) == {"low", "high"}
    assert max(found.values()) < 0


def test_adapters_writes_reads_and_expands(here: Path) -> None:
    *_, from_python = blocks(FILLED["docs/adapters.md"], "python")  # the others: test_compress.py
    names: dict[str, Any] = {}
    exec(from_python, names)  # noqa: S102  (our own pages)
    assert names["tasks"]("stored") == ["math", "code", "german"]
    again = load(here / "math-restored").state_dict()
    assert all(torch.allclose(again[key], names["weights"][key]) for key in names["weights"])


def test_the_front_page_serves_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FILLED["README.md"]
    saved = save_tasks(tmp_path, "bare-dinov2")
    (tmp_path / "models").mkdir()
    folders = []
    for source, name in zip(saved, ("hangul", "hiragana", "mnist"), strict=True):
        folders.append(str(source.rename(tmp_path / "models" / name)))
    monkeypatch.chdir(tmp_path)
    (typed,) = (
        line[2:].replace("0.06", "1.0").replace("10%", "0%").replace("bfloat16", "float32")
        for block in blocks(text, "text")
        for line in block.splitlines()
        if line.startswith("$ mergekit-cart compress")
    )
    arguments = [
        word for part in typed.split()[1:] for word in (folders if part == "models/*" else [part])
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output

    found = run("README.md")
    hangul = load(tmp_path / "served" / "base")
    assert not torch.allclose(answer(found["model"]), answer(hangul), atol=1e-3)
    done = CliRunner().invoke(main, ["expand", "served", "mnist", "mnist-again"])
    assert done.exit_code == 0, done.output
    # A class token of a bare encoder stays at the base's, as the guide says: all else comes back.
    again, first = (
        load(place).state_dict() for place in (tmp_path / "mnist-again", Path(folders[-1]))
    )
    unlike = {name for name in first if not torch.allclose(again[name], first[name], atol=1e-4)}
    assert unlike <= {"embeddings.cls_token", "embeddings.mask_token"} | {
        name for name in first if "position" in name
    }


def test_every_block_is_run_by_a_test() -> None:
    assert [page for page, _ in all_blocks("python")] == [
        "README.md",
        "docs/adapters.md",
        "docs/adapters.md",
        "docs/adapters.md",
        "docs/comparing.md",
        "docs/fusion-bench.md",
        "docs/how-it-works.md",
        "docs/how-it-works.md",
        "docs/inspecting.md",
        "docs/merging-adapters.md",
        "docs/merging-adapters.md",
    ]
