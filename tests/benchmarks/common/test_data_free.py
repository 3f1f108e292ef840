"""Methods beside mergekit's, on whole models."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.common import data_free, peers
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


def test_what_the_models_files_leave_out_is_the_bases() -> None:
    base = {"up.weight": random(6, 9), "position_ids": torch.arange(4)}
    tuned = [{"up.weight": random(6, 9, seed=seed)} for seed in (1, 2)]
    merged = data_free.merged_state(data_free.OF_TAUS["TSV-M"], tuned, base)
    assert torch.equal(merged["position_ids"], base["position_ids"])


def test_svc_comes_after_the_sum_and_after_tsvm() -> None:
    taus = [random(12, 9, seed=seed) for seed in range(3)]
    of_sum = data_free.OF_TAUS["SVC, task arithmetic"]
    assert torch.allclose(of_sum(taus), peers.svc(sum(taus), taus), atol=1e-5)
    merged = data_free.OF_TAUS["TSV-M"](taus)
    of_tsvm = data_free.OF_TAUS["SVC, TSV-M"]
    assert torch.allclose(of_tsvm(taus), peers.svc(merged, taus, 1.0), atol=1e-4)
    assert torch.linalg.norm(of_tsvm(taus)) <= torch.linalg.norm(merged) * (1 + 1e-5)


def test_doge_merges_what_fusion_bench_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_bench import BaseModelPool

    from benchmarks.vision.extra import MatrixDOGE

    class Encoder(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Linear(18, 12), torch.nn.Linear(12, 24))
            for number, parameter in enumerate(self.parameters()):
                parameter.data = 0.02 * random(*parameter.shape, seed=10 * seed + number)

    models = {"_pretrained_": Encoder(0)} | {f"task{seed}": Encoder(seed) for seed in (1, 2, 3)}
    states = [copy.deepcopy(model.state_dict()) for model in models.values()]
    base, *tuned = states
    found = data_free.merged_by("DOGE", tuned, base)
    method = MatrixDOGE(subspace=6, K=30, lamda=0.07)
    monkeypatch.setattr(MatrixDOGE, "device", torch.device("cpu"))
    theirs = method.run(BaseModelPool(models)).state_dict()
    for name, start in base.items():
        if start.dim() == 2:
            assert torch.allclose(found[name], theirs[name], atol=1e-5), name
            assert not torch.allclose(found[name], start, atol=1e-4)
        else:  # theirs stays at the base
            mean = sum(one[name] for one in tuned) / 3
            assert torch.allclose(found[name], mean, atol=1e-6), name


def test_doge_passes_over_what_was_not_trained() -> None:
    base = {"up.weight": random(12, 9)}
    tuned = [{"up.weight": base["up.weight"] + 0.1 * random(12, 9, seed=1)}, dict(base)]
    assert data_free.merged_by("DOGE", tuned, base)["up.weight"].isfinite().all()
