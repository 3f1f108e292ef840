"""What of a model's folder is read, and how exactly it is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cart_plugin.compress.adapters import decompose
from cart_plugin.compress.inputs import open_model
from cart_plugin.compress.layers import Layer
from cart_plugin.compress.work import square
from tests.compress.models import load, new_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A model in one file, and one of other values in shards."""
    model = new_model("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "single")
    for parameter in model.parameters():
        parameter.data.add_(1)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "single", tmp_path / "shards"


@pytest.mark.parametrize("stale", ["single", "shards"])
def test_of_a_single_file_and_shards_the_one_is_read_that_transformers_reads(
    saved: tuple[Path, Path], tmp_path: Path, stale: str
) -> None:
    # Whichever was written first: neither leaves a trace of when.
    old, new = saved if stale == "single" else saved[::-1]
    shutil.copytree(old, tmp_path / "both")
    for file in [*new.glob("model*.safetensors"), *new.glob("*.index.json")]:
        shutil.copyfile(file, tmp_path / "both" / file.name)
    model = open_model(tmp_path / "both", "both")
    for name, value in load(tmp_path / "both").state_dict().items():
        assert torch.equal(model.read(name), value), name
    assert model.bytes == (saved[0] / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", ["constant", "random"])
def test_norms_of_large_tensors_are_exact(kind: str) -> None:
    count = 2**25
    if kind == "constant":
        values = torch.full((count,), 0.02)
    else:
        values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in values.split(2**20))
    assert square(values.view(2**12, -1)) == pytest.approx(exact, rel=1e-10)
    assert square(values.view(2**12, -1).mT[:100]) > 0


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms_of_small_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert square(values) == pytest.approx(float(values.double().square().sum()), rel=1e-12)


def test_factors_within_the_range_of_fp16_may_sum_to_more() -> None:
    work = SimpleNamespace(options=SimpleNamespace(svd="exact", seed=0))
    layer = Layer("a.weight", "a", "linear", (64, 8192))
    difference = torch.full(layer.shape, 1000.0)
    a, b = decompose(work, layer, difference, 1, torch.float16, 1.0)  # type: ignore[arg-type]
    assert not torch.isfinite(a.sum())
    torch.testing.assert_close(layer.difference(a, b), difference, rtol=2e-3, atol=0)
