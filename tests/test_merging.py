"""CART on tensors and state dicts, against its equation in double precision."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cart_plugin import merging
from cart_plugin.errors import CartError, CartWarning
from cart_plugin.lowrank import RankRule, truncated_svd
from cart_plugin.merging import CartSettings, is_decomposed, merge_state_dicts, merge_tensors
from tests.support import (
    cart_formula,
    excess_energy,
    power_law,
    random,
    rank_deficient,
    relative_error,
    repeated,
    with_spectrum,
)

EXACT = "exact"


def versions(*shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Independent random tensors of one shape, one a model."""
    return [random(*shape, seed=seed, dtype=dtype) for seed in range(count)]


def with_spectra(values: Tensor, m: int, n: int, *, count: int = 4) -> list[Tensor]:
    """Matrices with the same singular values in different directions, one a model."""
    return [with_spectrum(values, m, n, seed=10 * seed) for seed in range(count)]


def is_close(merged: Tensor, expected: Tensor, centre: Tensor, size: float = 0.0) -> bool:
    """Whether what was added to a centre is right to 1e-5, but for the rounding of fp32.

    Args:
        merged: what is tested.
        expected: what it should be, in double precision.
        centre: what it was added to.
        size: norm of the terms of which the difference is the sum, if they cancel.
    """
    error = float((merged.double() - expected).norm())
    delta = float((expected - centre.double()).norm())
    rounding = torch.finfo(torch.float32).eps * float(expected.norm())
    return error <= 1e-5 * max(delta, size) + rounding


# Matrices of four models.
FAMILIES: dict[str, list[Tensor]] = {
    "random": versions(60, 60),
    "tall": versions(200, 40),
    "wide": versions(40, 200),
    "small": versions(2, 3),
    "decaying": with_spectra(power_law(60, 1), 60, 80),
    "steep": with_spectra(power_law(60, 2), 60, 80),
    "rank-deficient": with_spectra(rank_deficient(60, 3), 60, 80),
    "doubles": versions(60, 70, dtype=torch.float64),
}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 4.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_is_merged_as_the_equation_says(family: str, weights: list[float] | None) -> None:
    tensors = FAMILIES[family]
    full = min(tensors[0].shape)
    for k in sorted({1, max(1, full // 12), full // 3, full - 1} - {0}):
        given = CartSettings(rank=k, lambda_=1.7, svd=EXACT)
        merged = merge_tensors(tensors, given, weights=weights)
        expected = cart_formula(tensors, k, scale=1.7, weights=weights)
        centre = cart_formula(tensors, 0, weights=weights)
        # With most of each kept, the terms cancel: all of each would sum to zero.
        size = float(torch.stack([tensor - centre for tensor in tensors]).norm())
        assert is_close(merged, expected, centre, size if 8 * k > full else 0.0), k


@pytest.mark.parametrize("svd", ["auto", "fast"])
def test_the_other_solvers_stay_within_their_tolerance(svd: str) -> None:
    tensors = with_spectra(power_law(200, 0.5), 200, 200)
    merged = merge_tensors(tensors, CartSettings(svd=svd))
    expected, centre = cart_formula(tensors, 16), cart_formula(tensors, 0)
    assert relative_error(merged - centre, expected - centre) <= 2e-3


def test_small_differences_around_a_large_base_are_merged() -> None:
    base = random(60, 80, seed=99)
    tensors = [base + 1e-3 * tensor for tensor in with_spectra(power_law(60, 0.5), 60, 80)]
    expected = cart_formula(tensors, 5, scale=1.7)
    merged = merge_tensors(tensors, CartSettings(rank=5, lambda_=1.7))
    assert relative_error(merged, expected) <= 2 * torch.finfo(torch.float32).eps


def test_repeated_singular_values_are_merged_as_well_as_any() -> None:
    tensors = with_spectra(repeated(60, 5), 60, 80, count=3)
    zero = torch.zeros(60, 80)
    for k in (5, 10, 55):
        given = CartSettings(rank=k, center="base", svd=EXACT)
        merged = merge_tensors(tensors, given, base=zero)
        assert is_close(merged, cart_formula(tensors, k, base=zero), zero)
    for k in (1, 7, 33, 59):  # many matrices are the best one then
        given = CartSettings(rank=k, lambda_=1 / 3, center="base", svd=EXACT)
        merged = merge_tensors(tensors, given, base=zero, weights=[1.0, 0.0, 0.0])
        assert excess_energy(tensors[0], merged, k) <= 1e-5
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-5)) == k


@pytest.mark.parametrize("family", ["random", "tall", "rank-deficient"])
def test_uncentred_ablation_starts_at_the_base(family: str) -> None:
    tensors = FAMILIES[family]
    base = random(*tensors[0].shape, seed=99)
    weights = [1.0, 2.0, 0.5, 4.0]
    given = CartSettings(rank=3, lambda_=0.4, center="base", svd=EXACT)
    merged = merge_tensors(tensors, given, weights=weights, base=base)
    expected = cart_formula(tensors, 3, scale=0.4, weights=weights, base=base)
    assert is_close(merged, expected, base)


def test_uncentred_full_rank_is_task_arithmetic() -> None:
    tensors, base = versions(20, 30, count=3), random(20, 30, seed=99)
    full = CartSettings(rank_ratio=1.0, lambda_=0.3, center="base")
    expected = base + 0.3 * (tensors[0] + tensors[1] + tensors[2] - 3 * base)
    assert torch.allclose(merge_tensors(tensors, full, base=base), expected, atol=1e-5)


def test_experts_are_decomposed_one_by_one() -> None:
    tensors = versions(5, 30, 40)
    given = CartSettings(rank_ratio=0.1, svd=EXACT)
    merged = merge_tensors(tensors, given, name="mlp.experts.gate_up_proj")
    assert is_close(merged, cart_formula(tensors, 3), cart_formula(tensors, 0))
    for expert in range(5):
        alone = merge_tensors([tensor[expert] for tensor in tensors], given)
        assert relative_error(merged[expert], alone) <= 1e-6


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings.patch_embeddings.projection.weight", (16, 3, 4, 4)),
        ("layer1.0.conv1.weight", (16, 8, 3, 3)),
        ("mamba.mixer.conv1d.weight", (16, 4, 5)),
        ("encoder.conv3d.weight", (12, 3, 2, 2, 2)),
        (None, (16, 3, 4, 4)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_kernels_are_one_matrix(
    name: str | None, shape: tuple[int, ...], channels_last: bool
) -> None:
    tensors = versions(*shape)
    if channels_last and len(shape) == 4:
        tensors = [tensor.to(memory_format=torch.channels_last) for tensor in tensors]
    for center, base in (("average", None), ("base", tensors[0] + 1)):
        given = CartSettings(rank=3, center=center, svd=EXACT)  # type: ignore[arg-type]
        merged = merge_tensors(tensors, given, name=name, base=base)
        matrices = [tensor.reshape(shape[0], -1) for tensor in tensors]
        flat = None if base is None else base.reshape(shape[0], -1)
        expected = cart_formula(matrices, 3, base=flat).reshape(shape)
        assert merged.shape == shape
        assert relative_error(merged, expected) <= 1e-5


def test_energy_is_counted_per_model() -> None:
    tensors = with_spectra(power_law(40, 1), 40, 50)
    merged = merge_tensors(tensors, CartSettings(energy=0.8, svd=EXACT))
    centre = torch.stack(tensors).double().mean(0)
    expected = centre.clone()
    ranks = []
    for tensor in tensors:
        u, s, vh = torch.linalg.svd(tensor - centre, full_matrices=False)
        ranks.append(int((s.square().cumsum(0) / s.square().sum() >= 0.8).int().argmax()) + 1)
        expected += (u[:, : ranks[-1]] * s[: ranks[-1]]) @ vh[: ranks[-1]]
    assert max(ranks) < 40
    assert is_close(merged, expected, centre)


def test_rank_defaults_to_eight_percent_and_lambda_to_one() -> None:
    tensors = versions(100, 130)
    assert relative_error(merge_tensors(tensors), cart_formula(tensors, 8)) <= 1e-5


# --- algebra -----------------------------------------------------------------------------------


class Draw:
    """A few models' matrices and settings to merge them with."""

    def __init__(self, shape: tuple[int, int], count: int, seed: int, weighted: bool) -> None:
        self.tensors = [random(*shape, seed=seed + i) for i in range(count)]
        drawn = random(count, seed=seed + 50).abs() + 0.1
        self.weights = drawn.tolist() if weighted else [1.0] * count
        self.rank = 1 + seed % min(shape)
        self.settings = CartSettings(rank=self.rank, lambda_=0.5 + seed % 3, svd=EXACT)

    @property
    def mean(self) -> Tensor:
        """The weighted average."""
        return cart_formula(self.tensors, 0, weights=self.weights)

    def merge(
        self, tensors: Sequence[Tensor] | None = None, settings: CartSettings | None = None
    ) -> Tensor:
        """Merge these tensors, or others in their place."""
        return merge_tensors(
            self.tensors if tensors is None else tensors,
            settings or self.settings,
            weights=self.weights,
        )


draws = st.builds(
    Draw,
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    count=st.integers(3, 6),
    seed=st.integers(0, 10_000),
    weighted=st.booleans(),
)
algebra = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    return relative_error(found, expected) <= tolerance


@algebra
@given(draws, st.sampled_from([{"rank_ratio": 1.0}, {"rank": 100}, {"energy": 1.0}]))
def test_full_rank_gives_the_weighted_average(draw: Draw, rule: dict[str, Any]) -> None:
    assert close(draw.merge(settings=CartSettings(**rule, lambda_=2.5)), draw.mean)


@algebra
@given(draws, st.sampled_from([{"rank_ratio": 0.0}, {"rank": 0}, {"energy": 0.0}]))
def test_rank_zero_gives_the_weighted_average(draw: Draw, rule: dict[str, Any]) -> None:
    assert close(draw.merge(settings=CartSettings(**rule)), draw.mean)


@algebra
@given(draws)
def test_lambda_zero_gives_the_weighted_average(draw: Draw) -> None:
    assert close(draw.merge(settings=CartSettings(rank=draw.rank, lambda_=0.0)), draw.mean)


@algebra
@given(draws, st.randoms(use_true_random=False))
def test_order_of_models_does_not_matter(draw: Draw, shuffler: Any) -> None:
    order = list(range(len(draw.tensors)))
    shuffler.shuffle(order)
    merged = merge_tensors(
        [draw.tensors[i] for i in order],
        draw.settings,
        weights=[draw.weights[i] for i in order],
    )
    assert close(merged, draw.merge())


@algebra
@given(draws, st.integers(0, 100))
def test_adding_a_tensor_to_all_inputs_adds_it_to_the_output(draw: Draw, seed: int) -> None:
    offset = random(*draw.tensors[0].shape, seed=seed + 77)
    merged = draw.merge([tensor + offset for tensor in draw.tensors])
    assert close(merged, draw.merge() + offset, 1e-4)


@algebra
@given(draws, st.sampled_from([-2.0, 1e-6, 0.37, 1e6]))
def test_scaling_inputs_scales_the_output(draw: Draw, scale: float) -> None:
    merged = draw.merge([scale * tensor for tensor in draw.tensors])
    assert close(merged, scale * draw.merge())


@algebra
@given(draws, st.sampled_from([0.01, 3.0, 1e4]))
def test_only_the_ratio_of_weights_matters(draw: Draw, scale: float) -> None:
    scaled = [scale * weight for weight in draw.weights]
    assert close(merge_tensors(draw.tensors, draw.settings, weights=scaled), draw.merge())


@algebra
@given(draws)
def test_equal_models_give_themselves(draw: Draw) -> None:
    merged = draw.merge([draw.tensors[0]] * len(draw.tensors))
    assert close(merged, draw.tensors[0], 1e-6)


@algebra
@given(draws, st.integers(0, 100))
def test_permuting_rows_or_columns_commutes(draw: Draw, seed: int) -> None:
    m, n = draw.tensors[0].shape
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    merged = draw.merge([tensor[rows][:, columns] for tensor in draw.tensors])
    assert close(merged, draw.merge()[rows][:, columns], 1e-4)


@algebra
@given(draws)
def test_transposing_commutes(draw: Draw) -> None:
    assert close(draw.merge([tensor.mT for tensor in draw.tensors]), draw.merge().mT, 1e-4)


@algebra
@given(draws)
def test_two_models_give_their_average_whatever_the_rank(draw: Draw) -> None:
    pair, weights = draw.tensors[:2], draw.weights[:2]
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = merge_tensors(pair, CartSettings(rank=1, lambda_=3.0), weights=weights)
    assert close(merged, cart_formula(pair, 0, weights=weights))


# --- which tensors are decomposed --------------------------------------------------------------

DECOMPOSED = {
    # Llama, Qwen, Mistral
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (16, 64),
    "model.layers.31.mlp.down_proj.weight": (64, 172),
    # Qwen3-MoE: experts stacked, and router
    "model.layers.0.mlp.experts.gate_up_proj": (8, 48, 64),
    "model.layers.0.mlp.experts.down_proj": (8, 64, 24),
    "model.layers.0.mlp.gate.weight": (8, 64),
    "model.layers.0.mlp.experts.3.up_proj.weight": (24, 64),
    # GPT-2
    "transformer.h.0.attn.c_attn.weight": (64, 192),
    "h.11.mlp.c_proj.weight": (256, 64),
    # BERT, RoBERTa
    "bert.encoder.layer.0.attention.self.query.weight": (64, 64),
    "bert.encoder.layer.0.output.dense.weight": (64, 256),
    "bert.pooler.dense.weight": (64, 64),
    "roberta.encoder.layer.11.intermediate.dense.weight": (256, 64),
    # ViT, DINOv2, CLIP
    "vit.encoder.layer.0.attention.attention.key.weight": (64, 64),
    "vit.embeddings.patch_embeddings.projection.weight": (64, 3, 16, 16),
    "encoder.layer.3.mlp.fc1.weight": (256, 64),
    "vision_model.embeddings.patch_embedding.weight": (64, 3, 32, 32),
    "vision_model.encoder.layers.0.self_attn.out_proj.weight": (64, 64),
    "visual_projection.weight": (32, 64),
    # open_clip
    "visual.transformer.resblocks.0.attn.in_proj_weight": (192, 64),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (256, 64),
    "visual.conv1.weight": (64, 3, 32, 32),
    "visual.proj": (64, 32),
    "text_projection": (64, 32),
    # T5
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (128, 64),
    # ConvNeXt, wav2vec 2
    "convnext.encoder.stages.0.layers.0.dwconv.weight": (64, 1, 7, 7),
    "convnext.encoder.stages.0.layers.0.pwconv1.weight": (256, 64),
    "wav2vec2.feature_extractor.conv_layers.1.conv.weight": (32, 32, 3),
    # task heads are linear maps too; recipes leave them out
    "classifier.weight": (10, 64),
}
AVERAGED = {
    "model.embed_tokens.weight": (1000, 64),
    "lm_head.weight": (1000, 64),
    "model.norm.weight": (64,),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.q_norm.weight": (16,),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (8, 48),
    "transformer.wte.weight": (1000, 64),
    "wpe.weight": (128, 64),
    "transformer.h.0.attn.c_attn.bias": (192,),
    "gpt_neox.embed_in.weight": (1000, 64),
    "embed_out.weight": (1000, 64),
    "bert.embeddings.word_embeddings.weight": (1000, 64),
    "bert.embeddings.position_embeddings.weight": (128, 64),
    "bert.embeddings.token_type_embeddings.weight": (2, 64),
    "roberta.encoder.layer.0.output.LayerNorm.weight": (64,),
    "vit.embeddings.cls_token": (1, 1, 64),
    "vit.embeddings.position_embeddings": (1, 197, 64),
    "dinov2.embeddings.mask_token": (1, 64),
    "encoder.layer.0.layer_scale1.lambda1": (64,),
    "vision_model.embeddings.class_embedding": (64,),
    "vision_model.embeddings.position_embedding.weight": (50, 64),
    "text_model.embeddings.token_embedding.weight": (1000, 64),
    "visual.class_embedding": (64,),
    "visual.positional_embedding": (50, 64),
    "positional_embedding": (77, 64),
    "token_embedding.weight": (1000, 64),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (192,),
    "logit_scale": (),
    "pos_embed": (1, 197, 64),
    "shared.weight": (1000, 64),
    "encoder.embed_tokens.weight": (1000, 64),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
    "convnext.encoder.stages.0.layers.0.layer_scale_parameter": (64,),
    "model.decoder.embed_positions.weight": (128, 64),
    "model.embed_tokens_per_layer.weight": (1000, 64),
    "deberta.encoder.rel_embeddings.weight": (512, 64),
    "backbone.embeddings.weight": (1000, 64),
    "cls.predictions.decoder.weight": (1000, 64),
    "qformer.query_tokens": (1, 32, 64),
    "backbone.layers.0.mixer.A_log": (128, 16),
    "layer.with.one.row.weight": (1, 64),
    "layer.with.one.column.weight": (64, 1),
    "layer.with.nothing.weight": (0, 64),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_linear_maps_are_decomposed(name: str) -> None:
    assert is_decomposed(name, DECOMPOSED[name])


@pytest.mark.parametrize("name", AVERAGED)
def test_tables_biases_and_norms_are_averaged(name: str) -> None:
    shape = AVERAGED[name]
    assert not is_decomposed(name, shape)
    tensors = versions(*shape, count=3)
    merged = merge_tensors(tensors, CartSettings(lambda_=9.0), name=name)
    assert torch.allclose(merged, torch.stack(tensors).mean(0), atol=1e-6)


def test_without_a_name_the_shape_decides() -> None:
    assert is_decomposed(None, (4, 5))
    assert is_decomposed(None, (2, 4, 5))
    assert not is_decomposed(None, (5,))
    assert not is_decomposed(None, ())
    assert not is_decomposed(None, (1, 5))


def test_callers_may_decide_what_is_decomposed() -> None:
    tensors = versions(8, 9)
    name = "model.embed_tokens.weight"
    average = torch.stack(tensors).mean(0)
    forced = merge_tensors(tensors, name=name, decompose=True)
    assert relative_error(forced, cart_formula(tensors, 1)) <= 1e-5
    assert torch.allclose(merge_tensors(tensors, name="q.weight", decompose=False), average)
    state_dicts = [{"q.weight": tensor} for tensor in tensors]
    merged = merge_state_dicts(state_dicts, decompose=lambda name, shape: False)
    assert torch.allclose(merged["q.weight"], average)


# --- state dicts -------------------------------------------------------------------------------


def state_dict(seed: int) -> dict[str, Tensor]:
    """A model of a few layers."""
    return {
        "embed_tokens.weight": random(20, 8, seed=seed),
        "fc.weight": random(16, 12, seed=seed + 100),
        "fc.bias": random(12, seed=seed + 200),
        "position_ids": torch.arange(20)[None],
    }


def test_state_dict_is_merged_tensor_by_tensor() -> None:
    models = [state_dict(seed) for seed in range(3)]
    merged = merge_state_dicts(models, CartSettings(rank=2))
    assert list(merged) == list(models[0])
    expected = cart_formula([model["fc.weight"] for model in models], 2)
    assert relative_error(merged["fc.weight"], expected) <= 1e-5
    for name in ("embed_tokens.weight", "fc.bias"):
        assert torch.allclose(merged[name], torch.stack([m[name] for m in models]).mean(0))
    assert torch.equal(merged["position_ids"], models[0]["position_ids"])
    assert merged["position_ids"] is not models[0]["position_ids"]


def test_lazy_state_dicts_are_asked_once_for_each_tensor() -> None:
    class Lazy(Mapping[str, Tensor]):
        def __init__(self, loaded: dict[str, Tensor]) -> None:
            self.loaded, self.asked = loaded, list[str]()

        def __getitem__(self, name: str) -> Tensor:
            self.asked.append(name)
            return self.loaded[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.loaded)

        def __len__(self) -> int:
            return len(self.loaded)

    models = [Lazy(state_dict(seed)) for seed in range(3)]
    merge_state_dicts(models)
    for model in models:
        assert model.asked == list(model.loaded)


def test_base_of_the_uncentred_ablation_comes_as_a_state_dict() -> None:
    models, base = [state_dict(seed) for seed in range(3)], state_dict(9)
    given = CartSettings(rank=2, center="base")
    merged = merge_state_dicts(models, given, base=base)
    tensors = [model["fc.weight"] for model in models]
    assert (
        relative_error(merged["fc.weight"], cart_formula(tensors, 2, base=base["fc.weight"])) < 1e-5
    )
    average = torch.stack([model["fc.bias"] for model in models]).mean(0)
    assert torch.allclose(merged["fc.bias"], average)


def test_a_base_that_is_not_used_need_not_fit() -> None:
    models = [state_dict(seed) for seed in range(3)]
    unused = {"other": torch.zeros(1)}
    merged = merge_state_dicts(models, base=unused)
    assert torch.equal(merged["fc.weight"], merge_state_dicts(models)["fc.weight"])
    broken = torch.full((4, 4), math.nan)
    assert torch.isfinite(merge_tensors(versions(4, 4), base=broken)).all()


def test_each_tensor_has_its_own_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recorded(x: Tensor, rule: RankRule, *, svd: str, seed: int) -> Any:
        seeds.append(seed)
        return truncated_svd(x, rule, svd=svd, seed=seed)

    monkeypatch.setattr(merging, "truncated_svd", recorded)
    tensors = versions(8, 8, count=3)
    for name, seed in (("a.weight", 0), ("b.weight", 0), ("a.weight", 5), ("a.weight", 0)):
        merge_tensors(tensors, CartSettings(seed=seed), name=name)
    assert [len(set(seeds[i : i + 3])) for i in (0, 3, 6, 9)] == [1, 1, 1, 1]
    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[9]


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(12, 14), (12,), (0, 4), ()], ids=str)
def test_dtype_of_the_inputs_is_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = versions(*shape, dtype=dtype)
    before = [tensor.clone() for tensor in tensors]
    merged = merge_tensors(tensors)
    assert merged.dtype == dtype
    assert merged.shape == shape
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert merged.data_ptr() == 0 or merged.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_the_rounding_of_single(dtype: torch.dtype) -> None:
    tensors = versions(40, 50, dtype=dtype)
    merged = merge_tensors(tensors)
    assert torch.equal(merged, merge_tensors([tensor.float() for tensor in tensors]).to(dtype))


def test_mixed_dtypes_promote() -> None:
    half, brain, single = random(8, 8), random(8, 8, seed=1), random(8, 8, seed=2)
    mixed = [half.to(torch.float16), brain.to(torch.bfloat16)]
    assert merge_tensors([*mixed, mixed[0]]).dtype == torch.float32
    assert merge_tensors([mixed[0], mixed[0], single]).dtype == torch.float32
    assert merge_tensors([mixed[0], single, single.double()]).dtype == torch.float64


@pytest.mark.parametrize("shape", [(6,), (6, 6)], ids=str)
def test_half_values_whose_sum_overflows_are_merged(shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, 6e4, dtype=torch.float16) for _ in range(8)]
    assert torch.isinf(tensors[0] + tensors[1]).all()
    assert torch.equal(merge_tensors(tensors), tensors[0])


@pytest.mark.parametrize("shape", [(600,), (600, 600)], ids=str)
def test_large_finite_values_whose_sum_overflows_are_merged(shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, 3e38) for _ in range(3)]
    assert torch.allclose(merge_tensors(tensors), tensors[0])


def test_a_result_beyond_half_precision_is_refused() -> None:
    tensors = [4e4 * with_spectrum(rank_deficient(8, 1), 8, 8, seed=seed) for seed in range(4)]
    halves = [tensor.to(torch.float16) for tensor in tensors]
    message = "tensor 'up.weight': the merged values leave the range of torch.float16; use a wider"
    with pytest.raises(CartError, match=message):
        merge_tensors(halves, CartSettings(rank=1, lambda_=50.0), name="up.weight")


def test_gradients_are_not_recorded() -> None:
    tensors = [tensor.requires_grad_() for tensor in versions(6, 7, count=3)]
    assert not merge_tensors(tensors).requires_grad


def test_noncontiguous_inputs_are_merged() -> None:
    tensors = [tensor.mT for tensor in versions(30, 20)]
    assert relative_error(merge_tensors(tensors), cart_formula(tensors, 1)) <= 1e-5


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(6, 7), (6,), (2, 6, 7)], ids=str)
def test_values_that_are_not_finite_name_model_and_tensor(
    value: float, shape: tuple[int, ...]
) -> None:
    tensors = versions(*shape)
    tensors[2].view(-1)[:2] = value
    count = math.prod(shape)
    message = rf"tensor 'q\.weight' of gamma holds 2 NaN or infinite values out of {count}"
    for weights in (None, [1.0, 1.0, 0.0, 1.0]):
        with pytest.raises(CartError, match=message):
            merge_tensors(
                tensors,
                name="q.weight",
                models=["alpha", "beta", "gamma", "delta"],
                weights=weights,
            )


def test_opposite_infinities_are_found() -> None:
    tensors = versions(3, 4)
    tensors[0][0, 0], tensors[1][0, 0] = math.inf, -math.inf
    with pytest.raises(CartError, match="tensor of 0 holds 1 NaN or infinite values out of 12"):
        merge_tensors(tensors)


def test_broken_base_is_named_where_it_is_the_centre() -> None:
    given = CartSettings(center="base")
    broken = torch.full((4, 4), math.nan)
    with pytest.raises(CartError, match="of the base model holds 16 NaN or infinite values"):
        merge_tensors(versions(4, 4), given, base=broken)
    tensors = versions(4, 4)
    tensors[1][0, 0] = math.nan
    with pytest.raises(CartError, match="tensor of 1 holds 1 NaN"):
        merge_tensors(tensors, given, base=torch.zeros(4, 4))


def test_shapes_that_differ_name_both_models() -> None:
    tensors = [*versions(4, 5, count=2), random(4, 6)]
    message = r"tensor 'w' is \(4, 5\) in a but \(4, 6\) in c; merged models must have the same"
    with pytest.raises(CartError, match=message):
        merge_tensors(tensors, name="w", models=["a", "b", "c"])
    with pytest.raises(CartError, match=r"but \(2, 2\) in the base model"):
        merge_tensors(tensors[:2], CartSettings(center="base"), base=torch.zeros(2, 2))


def test_a_missing_tensor_names_the_model_that_lacks_it() -> None:
    models = {name: state_dict(seed) for seed, name in enumerate("abc")}
    del models["b"]["fc.bias"]
    message = r"b lacks 1 tensors that other models have: fc\.bias; merged models must have"
    with pytest.raises(CartError, match=message):
        merge_state_dicts(models)
    base = state_dict(9) | {f"head.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(CartError, match=r"lacks .* head\.0, head\.1, head\.2 \.\.\.;"):
        merge_state_dicts([state_dict(0)] * 3, CartSettings(center="base"), base=base)


def test_fewer_than_two_models_are_refused() -> None:
    message = (
        r"at least two fine-tuned models \(three to gain from it\); tensor 'w' comes from 1: a"
    )
    with pytest.raises(CartError, match=message):
        merge_tensors([random(3, 3)], name="w", models=["a"])
    with pytest.raises(CartError, match="comes from 0: none"):
        merge_tensors([])
    with pytest.raises(CartError, match="at least two fine-tuned models"):
        merge_state_dicts([state_dict(0)])
    with pytest.raises(CartError, match="at least two fine-tuned models, got none"):
        merge_state_dicts([])


def test_two_models_warn_only_where_it_matters() -> None:
    pair = versions(5, 6, count=2)
    with pytest.warns(CartWarning, match=r"use three or more.* or center: base"):
        merge_tensors(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_tensors(pair, CartSettings(rank=0))
        merge_tensors(pair, CartSettings(center="base"), base=random(5, 6, seed=9))
        merge_tensors(versions(6, count=2))
        merge_tensors(versions(5, 6, count=3))


def test_center_base_without_a_base_is_refused() -> None:
    given = CartSettings(center="base")
    with pytest.raises(CartError, match="center is 'base' but there is no base model; give one"):
        merge_tensors(versions(4, 4), given)
    with pytest.raises(CartError, match=r"tensor 'embed_tokens\.weight': center is 'base' but"):
        merge_state_dicts([state_dict(seed) for seed in range(3)], given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambda_": math.nan}, "lambda must be a finite number, got nan"),
        ({"lambda_": math.inf}, "lambda must be a finite number, got inf"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, got 'quick'"),
        ({"lambda_": "1"}, "lambda must be a finite number, got '1'"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
    ],
    ids=repr,
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartSettings(**values)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, -1.0, 0.0],
        [0.0, 0.0, 0.0],
        [-1.0, -1.0, -1.0],
    ],
    ids=repr,
)
def test_weights_that_sum_to_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(CartError, match="tensor 'w': weights must sum to more than 0, got "):
        merge_tensors(versions(4, 4, count=3), weights=weights, name="w")


@pytest.mark.parametrize(
    "weights",
    [
        [math.nan, 1.0, 1.0],
        [math.inf, 1.0, 1.0],
        [math.inf, -math.inf, 1.0],
        [1e308, 1e308, 1e308],
    ],
    ids=repr,
)
def test_weights_without_a_finite_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(CartError, match="tensor 'w': weights must be finite numbers, got "):
        merge_tensors(versions(4, 4, count=3), weights=weights, name="w")


def test_as_many_weights_as_models_are_required() -> None:
    with pytest.raises(CartError, match="3 models but 2 weights"):
        merge_tensors(versions(4, 4, count=3), weights=[1.0, 1.0])


def test_a_model_of_weight_zero_leaves_no_trace() -> None:
    tensors = versions(20, 30, count=4)
    given = CartSettings(rank=3, svd=EXACT)
    merged = merge_tensors(tensors, given, weights=[1.0, 2.0, 0.0, 3.0])
    others = [tensors[i] for i in (0, 1, 3)]
    centre = cart_formula(others, 0, weights=[1.0, 2.0, 3.0])
    # mean(w) counts the model: it lowers the sum as a zero vector in its place would
    expected = cart_formula(others, 3, weights=[1.0, 2.0, 3.0], scale=4 / 3)
    assert relative_error(merged - centre, expected - centre) <= 1e-5


def test_negative_weights_subtract() -> None:
    tensors, weights = versions(20, 30, count=3), [2.0, 1.0, -0.5]
    merged = merge_tensors(tensors, CartSettings(rank=4, svd=EXACT), weights=weights)
    assert relative_error(merged, cart_formula(tensors, 4, weights=weights)) <= 1e-5


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    tensors = [*versions(4, 4, count=2), torch.ones(4, 4, dtype=dtype)]
    message = rf"tensor 'w' of c is {dtype}; quantised or integer weights cannot be averaged"
    with pytest.raises(CartError, match=message):
        merge_tensors(tensors, name="w", models=["a", "b", "c"])
    with pytest.raises(CartError, match="quantised or integer weights"):
        merge_state_dicts([{"w": tensor} for tensor in tensors])


def test_weights_that_are_not_loaded_are_refused() -> None:
    tensors = [*versions(4, 4, count=2), torch.empty(4, 4, device="meta")]
    with pytest.raises(CartError, match="tensor of 2 is on the meta device"):
        merge_tensors(tensors)


def test_counters_end_at_the_largest() -> None:
    models = [{"num_batches_tracked": torch.tensor(count)} for count in (3, 9, 5)]
    assert torch.equal(merge_state_dicts(models)["num_batches_tracked"], torch.tensor(9))


def test_buffers_that_differ_are_refused() -> None:
    models = {name: state_dict(seed) for seed, name in enumerate("abc")}
    models["c"]["position_ids"] = models["c"]["position_ids"] + 1
    message = "tensor 'position_ids' holds integers that differ between a and c; only buffers"
    with pytest.raises(CartError, match=message):
        merge_state_dicts(models)
    models["c"]["position_ids"] = torch.arange(5)
    with pytest.raises(CartError, match="differ between a and c"):
        merge_state_dicts(models)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 5)], ids=str)
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    merged = merge_tensors([torch.zeros(shape) for _ in range(3)], name="fc.weight")
    assert merged.shape == shape


def test_equal_models_come_out_unchanged_to_the_last_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = random(30, 40, dtype=dtype)
        assert torch.equal(merge_tensors([tensor] * 4), tensor)


# --- memory ------------------------------------------------------------------------------------


def test_peak_memory_does_not_grow_with_the_number_of_models() -> None:
    """Counted in bytes that torch asks its allocator for, by its profiler."""

    def peak(count: int) -> int:
        tensors = versions(256, 256, count=count, dtype=torch.bfloat16)
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
            merge_tensors(tensors, CartSettings(svd=EXACT))
        used = highest = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                used += event.nbytes()
                highest = max(highest, used)
        return highest

    assert tracemalloc.is_tracing() is False
    few, many = peak(3), peak(12)
    assert few > 256 * 256 * 4
    assert many <= 1.1 * few
