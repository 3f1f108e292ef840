"""How much memory and disk a merge is said to take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.files import resumable
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.doctor import costs
from cart_plugin.doctor.findings import Finding, Level
from cart_plugin.doctor.merges import Merge
from cart_plugin.doctor.planning import PlannedTensor
from cart_plugin.doctor.recipe import check_recipe
from tests.doctor.test_adapters import save_adapter
from tests.doctor.tiny import save_model, write_recipe

SIDE = 1024
COPY = 4 * SIDE**2  # bytes in fp32
MODEL = 202  # KB of a Llama model
Findings = Callable[..., list[Finding]]


def peak(method: str, inputs: int, table: bool = False, **recipe: Any) -> float:
    models = [f"m{number}" for number in range(inputs)]
    config = MergeConfiguration.model_validate(
        {"merge_method": method, "models": [{"model": model} for model in models], **recipe}
    )
    sources = dict.fromkeys(models, ("x",))
    planned = PlannedTensor("x", 0 if table else None, False, sources, {}, {}, None)
    held = dict.fromkeys(models, TensorInfo((SIDE, SIDE), torch.float32))
    return costs.peak(Merge(planned, held, []), config)


@pytest.mark.parametrize(
    ("method", "inputs", "measured"),  # copies in fp32 beside the inputs, at 2048x2048
    [("linear", 8, 4), ("ties", 3, 9), ("ties", 8, 23.7), ("dare_ties", 8, 28.7), ("della", 3, 13)],
)
def test_mergekits_methods_take_no_more_than_is_said(
    method: str, inputs: int, measured: float
) -> None:
    assert (inputs + measured) * COPY <= peak(method, inputs) <= 4 * (inputs + 8) * COPY


@pytest.mark.parametrize("method", ["cart", "linear"])
@pytest.mark.parametrize(
    "recipe", [{"tokenizer": {"source": "union"}}, {"tokenizer_source": "base"}], ids=str
)
def test_a_tokenizer_that_is_made_anew_takes_the_tables_twice(
    recipe: dict[str, Any], method: str
) -> None:
    """Of eight models with a table of 41 MB: a peak of 839 MB without one, and of 1,182 with."""
    assert peak(method, 8, table=True, **recipe) == peak(method, 8, table=True) + 8 * COPY
    assert peak("linear", 8, **recipe) == peak("linear", 8)


@pytest.fixture
def needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Findings:
    """What is said of memory or disk before a merge, with some bytes free there and no program."""
    monkeypatch.setattr(costs, "PROGRAM_BYTES", 0)

    def needs(
        what: str,
        models: list[str],
        options: MergeOptions | None = None,
        *,
        memory: int = 10**12,
        disk: int = 10**12,
        out: Path | None = None,
        **recipe: Any,
    ) -> list[Finding]:
        monkeypatch.setattr(costs, "available_memory", lambda: memory)
        monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
        found: list[Finding] = []
        file = write_recipe(tmp_path / "r.yaml", models, **recipe)
        check_recipe(file, out, lambda it: found.extend(it.findings), options=options)
        return [finding for finding in found if finding.fact.startswith(f"{what} needed")]

    return needs


@pytest.fixture
def fused(llamas: list[str], tmp_path: Path) -> list[str]:
    """Two adapters of the first model, with it."""
    adapters = [save_adapter(tmp_path / f"lora-{number}", llamas[0]) for number in range(2)]
    return [f"{llamas[0]}+{adapter}" for adapter in adapters]


def test_shards_are_as_large_as_the_options_have_them(needs: Findings, llamas: list[str]) -> None:
    for options in (None, MergeOptions()):
        (finding,) = needs("memory", llamas, options)
        assert f"up to about {MODEL + 74} KB" in finding.fact
    (finding,) = needs("memory", llamas, MergeOptions(out_shard_size=10_000))
    assert "up to about 83.7 KB" in finding.fact


def test_smaller_shards_are_advised_where_they_help(
    needs: Findings, llamas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = needs("memory", llamas, memory=1000)
    assert finding.advice == "close other programs"
    monkeypatch.setattr(costs, "_SMALL_SHARD", 100_000)
    (finding,) = needs("memory", llamas, memory=1000)
    assert finding.advice == "pass --out-shard-size 1B to mergekit, or close other programs"
    (finding,) = needs("memory", llamas, MergeOptions(out_shard_size=100_000), memory=1000)
    assert finding.advice == "close other programs"


def test_a_base_is_held_whole_while_its_adapter_is_fused(
    needs: Findings, fused: list[str], tmp_path: Path
) -> None:
    small = MergeOptions(out_shard_size=10_000)
    largest = 4 * 32 * 32  # a query's matrix in fp32
    (finding,) = needs("memory", [*fused, fused[0].split("+")[0]], small)
    assert f"up to about {round(MODEL + 4 * largest / 1000)} KB" in finding.fact
    assert f"most for fusing {fused[0]}, whose base is held whole" in finding.fact
    (finding,) = needs("memory", fused, small, memory=1000)
    assert "fuse the adapters on a larger machine" in finding.advice
    half = MergeOptions(out_shard_size=10_000, lora_merge_dtype="bfloat16")
    (finding,) = needs("memory", fused, half)
    assert f"up to about {round(MODEL / 2 + 4 * largest / 1000)} KB" in finding.fact


def test_fused_models_and_the_result_need_their_room_at_one_time(
    needs: Findings, fused: list[str], tmp_path: Path
) -> None:
    options, recipe = MergeOptions(), {"merge_method": "linear", "parameters": {"weight": 1.0}}
    for free, level in ((3 * MODEL - 10, Level.PROBLEM), (3 * MODEL + 10, Level.OK)):
        models, total = needs("disk", fused, options, disk=1000 * free, **recipe)
        assert models.fact == f"disk needed for the fused models: {2 * MODEL} KB"
        assert total.level is level
        assert total.fact.startswith("disk needed: 606 KB, the fused models among it, free at ")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_cache_of_fused_models_may_hold_them_or_be_elsewhere(
    is_named: bool,
    needs: Findings,
    fused: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mergekit's own commands get a flag, of which the doctor does not hear."""
    cache = tmp_path / "cache" / "of" / "models"
    options = MergeOptions(lora_merge_cache=str(cache)) if is_named else None
    free = 1000 * (3 * MODEL - 10)
    _, total, both = needs("disk", fused, options, disk=free)
    assert (total.level, both.level) == (Level.OK, Level.WARNING)
    assert total.fact.startswith(f"disk needed: {MODEL} KB, free")
    assert both.fact.startswith("disk needed: 606 KB for the result and the fused models")
    assert "on another file system" in both.advice
    assert len(needs("disk", fused, options, disk=2 * free)) == 2
    if is_named:
        before = Path.stat

        def stat(path: Path, **options: Any) -> Any:
            return SimpleNamespace(st_dev=-1) if path == cache else before(path, **options)

        cache.mkdir(parents=True)
        monkeypatch.setattr(Path, "stat", stat)
        assert len(needs("disk", fused, options, disk=free)) == 2
        (*_, elsewhere) = needs("disk", fused, options, disk=1000 * (2 * MODEL - 10))
        assert elsewhere.fact.startswith("disk needed: 404 KB for the fused models, free at ")


def test_models_that_an_interrupted_merge_has_fused_are_there(
    needs: Findings, fused: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with resumable(out) as work:
        made = save_model(work.folder / "fused" / "fused-0123", "llama", 0)
        size = sum(file.stat().st_size for file in made.iterdir())
    _, total = needs("disk", fused, MergeOptions(), out=out)
    assert f" beside the {round(size / 1000)} KB of an interrupted merge" in total.fact
    assert f"disk needed: {round(606 - size / 1000)} KB, " in total.fact
