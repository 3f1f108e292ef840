"""Methods beside mergekit's, on whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.common import data_free, peers
from tests.doctor.tiny import save_models
from tests.support import random


@pytest.mark.parametrize("method", data_free.OF_TAUS)
def test_each_merges_matrices_one_by_one_and_averages_the_rest(method: str) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return {
            "up_proj.weight": random(6, 9, seed=seed),
            "mlp.experts.up_proj": random(2, 6, 9, seed=10 + seed),
            "norm.weight": random(9, seed=20 + seed),
        }

    base, *tuned = (state(seed) for seed in range(4))
    of_taus = data_free.OF_TAUS[method]
    merged = data_free.merged_state(of_taus, tuned, base)
    taus = [one["up_proj.weight"] - base["up_proj.weight"] for one in tuned]
    torch.manual_seed(0)  # for DARE, which goes on from weight to weight
    assert torch.equal(merged["up_proj.weight"], base["up_proj.weight"] + of_taus(taus))
    for index in range(2):
        expert = [
            (one["mlp.experts.up_proj"] - base["mlp.experts.up_proj"])[index] for one in tuned
        ]
        found = merged["mlp.experts.up_proj"][index] - base["mlp.experts.up_proj"][index]
        assert torch.allclose(found, of_taus(expert), atol=1e-6)
    mean = sum(one["norm.weight"] for one in tuned) / 3
    assert torch.allclose(merged["norm.weight"], mean, atol=1e-6)


def test_dare_draws_another_mask_for_the_next_weight_of_a_shape() -> None:
    base = {f"{place}.up_proj.weight": torch.zeros(6, 9) for place in "ab"}
    tuned = [dict.fromkeys(base, random(6, 9, seed=seed)) for seed in range(3)]
    merged = data_free.merged_state(data_free.OF_TAUS["DARE-TIES"], tuned, base)
    assert not torch.equal(merged["a.up_proj.weight"], merged["b.up_proj.weight"])


def test_wudi_merges_what_fusion_bench_merges() -> None:
    from fusion_bench.method.wudi.wudi import wudi_merging

    taus = [1e-3 * random(12, 7, seed=seed) for seed in range(3)]
    theirs = wudi_merging([{"w": tau} for tau in taus], "cpu", iter_num=40)["w"]
    assert torch.allclose(data_free.wudi(taus, 40), theirs, atol=1e-6)
    assert not torch.allclose(data_free.wudi(taus, 40), sum(taus), atol=1e-4)


def test_wudi_passes_over_a_model_that_left_a_matrix_at_its_base() -> None:
    taus = [random(6, 9, seed=0), torch.zeros(6, 9), random(6, 9, seed=1)]
    found = data_free.wudi(taus)
    assert found.isfinite().all()
    assert torch.equal(found, data_free.wudi([taus[0], taus[2]]))
    assert not data_free.wudi([taus[1], taus[1]]).any()


def test_merged_models_are_made_once_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    base, *tuned = map(Path, save_models(tmp_path / "models", "llama", count=3))
    found = data_free.merged_models(["ASWUDI"], tuned, base, tmp_path / "beside")
    name = "model.layers.0.mlp.up_proj.weight"
    start, *states = (load_file(path / data_free.WEIGHTS) for path in (base, *tuned))
    expected = start[name] + peers.aswudi([state[name] - start[name] for state in states])
    model = AutoModelForCausalLM.from_pretrained(found["ASWUDI"])
    assert torch.allclose(model.state_dict()[name], expected, atol=1e-6)
    monkeypatch.setattr(data_free, "merged_state", None)  # it is not called again
    assert data_free.merged_models(["ASWUDI"], tuned, base, tmp_path / "beside") == found


def test_what_the_models_files_leave_out_is_the_bases() -> None:
    base = {"up.weight": random(6, 9), "position_ids": torch.arange(4)}
    tuned = [{"up.weight": random(6, 9, seed=seed)} for seed in (1, 2)]
    merged = data_free.merged_state(data_free.OF_TAUS["TSV-M"], tuned, base)
    assert torch.equal(merged["position_ids"], base["position_ids"])
