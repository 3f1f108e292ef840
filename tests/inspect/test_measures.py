"""What is said of one weight, against dense computations and the merges themselves."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from cart_plugin import CartSettings, CartWarning, merge_tensors
from cart_plugin.errors import CartError
from cart_plugin.inspect.inputs import Inputs
from cart_plugin.inspect.measures import record
from cart_plugin.inspect.merges import (
    AUTO,
    AUTO_WITH_BASE,
    AVERAGE,
    CART,
    MERGED,
    SCALE,
    TASK_ARITHMETIC,
)
from cart_plugin.inspect.places import place
from cart_plugin.inspect.weights import Weight, of_factors, of_tensors
from cart_plugin.merging.spans import Difference
from tests.support import power_law, random, relative_error, with_spectrum

NAME = "layers.3.mlp.down_proj.weight"


def tuned(
    count: int, *, m: int = 24, n: int = 32, common: float = 0.3
) -> tuple[Tensor, list[Tensor]]:
    """A base and models of it, whose changes decay and have something in common."""
    base = random(m, n, seed=99)
    shared = with_spectrum(power_law(min(m, n), 0.8), m, n, seed=55)
    changes = [
        with_spectrum(power_law(min(m, n), 0.8), m, n, seed=10 * t) + common * shared
        for t in range(count)
    ]
    return base, [base + 0.1 * change for change in changes]


def names(count: int) -> list[str]:
    return [f"model{index}" for index in range(count)]


def weight_of(tensors: list[Tensor], base: Tensor | None = None, **options: Tensor) -> Weight:
    found = of_tensors(NAME, tensors, names(len(tensors)), base, **options)
    assert isinstance(found, Weight)
    return found


def answer(change: Tensor, total: Tensor, few: int) -> tuple[float, float]:
    """Kept and lost on the inputs that the leading rows of a change stand for, densely."""
    _, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    inputs = vh[:few].mT * s[:few] / s[:few].norm()
    own, got = change.double() @ inputs, total.double() @ inputs
    size = own.square().sum()
    return float((own * got).sum() / size), float((own - got).square().sum() / size)


@pytest.mark.parametrize("has_base", [True, False])
def test_many_that_lora_has_made_are_merged_as_such(has_base: bool) -> None:
    base = random(24, 32, seed=9)
    tensors = [base + random(24, 2, seed=t) @ random(2, 32, seed=50 + t) for t in range(6)]
    start = base if has_base else torch.stack(tensors).mean(dim=0)
    found = dict(weight_of(tensors, base if has_base else None).merges())
    expected = merge_tensors(tensors, CartSettings(lambda_="auto"), name=NAME)
    assert torch.allclose(start + found[AUTO][0], expected, atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("has_base", [True, False])
def test_methods_are_those_that_merge_weights(count: int, has_base: bool) -> None:
    base, tensors = tuned(count)
    start = base if has_base else torch.stack(tensors).mean(dim=0)
    expected = {
        AVERAGE: torch.stack(tensors).mean(dim=0),
        TASK_ARITHMETIC: base + SCALE * (torch.stack(tensors) - base).sum(dim=0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CartWarning)
        expected[CART] = merge_tensors(tensors, name=NAME)
        expected[AUTO] = merge_tensors(tensors, CartSettings(lambda_="auto"), name=NAME)
        expected[AUTO_WITH_BASE] = merge_tensors(
            tensors, CartSettings(lambda_="auto"), base=base, name=NAME
        )
    found = dict(weight_of(tensors, base if has_base else None).merges())
    wanted = {AVERAGE}
    wanted |= {TASK_ARITHMETIC} if has_base else set()
    wanted |= {CART, AUTO} if count > 2 else set()
    wanted |= {AUTO_WITH_BASE} if has_base and count <= 4 else set()
    assert set(found) == wanted
    for method, total in found.items():
        assert torch.allclose(start + total[0], expected[method], atol=2e-5), method


def test_of_adapters_merged_into_a_model_the_methods_are_those_that_merge_weights() -> None:
    base = random(24, 32, seed=99)
    tensors = [base + random(24, 3, seed=t) @ random(3, 32, seed=t + 50) / 20 for t in range(4)]
    found = dict(weight_of(tensors, base).merges())
    auto = CartSettings(lambda_="auto")
    assert (
        relative_error(
            base + found[AUTO_WITH_BASE][0], merge_tensors(tensors, auto, base=base, name=NAME)
        )
        < 1e-5
    )
    assert relative_error(base + found[CART][0], merge_tensors(tensors, name=NAME)) < 1e-5


def test_factors_say_what_the_whole_weights_say() -> None:
    base = random(40, 48, seed=99)
    factors = [(random(40, 4, seed=t), random(4, 48, seed=t + 50) / 20) for t in range(3)]
    whole = record(weight_of([base + b @ a for b, a in factors], base), names(3))
    found = record(
        of_factors(
            NAME,
            (1, 40, 48),
            [Difference(b[None], a[None]) for b, a in factors],
            norms=base.double().square().sum(),
        ),
        names(3),
    )
    for key in ("moved", "energy", "effective_rank", "rank", "numerical_rank", "rho"):
        assert found[key] == pytest.approx(whole[key], rel=1e-3), key
    for key in ("cosines", "row_overlap", "column_overlap", "apart"):
        for one, other in zip(found[key], whole[key], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5), key
    for kind, curve in itertools.product(("centred", "from_base"), "RI"):
        assert found[kind][curve] == pytest.approx(whole[kind][curve], rel=1e-3, abs=1e-5)
    assert found["methods"].keys() == whole["methods"].keys()
    for method, entry in whole["methods"].items():
        for key, values in entry.items():
            if values is not None:
                assert found["methods"][method][key] == pytest.approx(values, rel=5e-3), method


@pytest.mark.parametrize("has_base", [True, False])
def test_what_a_merge_keeps_is_what_it_answers_on_a_models_own_rows(has_base: bool) -> None:
    base, tensors = tuned(3)
    merged = torch.stack(tensors).mean(dim=0) + 0.05 * random(24, 32, seed=5)
    found = record(weight_of(tensors, base if has_base else None, merged=merged), names(3))
    start = base if has_base else torch.stack(tensors).mean(dim=0)
    few = math.floor(0.08 * 24)
    expected = [answer(tensor - start, merged - start, few) for tensor in tensors]
    got = found["methods"][MERGED]
    assert got["kept"] == pytest.approx([kept for kept, _ in expected], rel=1e-4)
    assert got["lost"] == pytest.approx([lost for _, lost in expected], rel=1e-4)


def test_a_model_merged_with_itself_keeps_all() -> None:
    base, tensors = tuned(2)
    found = record(weight_of(tensors, base, merged=tensors[1]), names(2))
    assert found["methods"][MERGED]["kept"][1] == pytest.approx(1, abs=1e-5)
    assert found["methods"][MERGED]["lost"][1] == pytest.approx(0, abs=1e-9)
    assert found["methods"][MERGED]["lost"][0] > 0.3


def test_norms_cosines_and_distances_are_those_of_the_weights() -> None:
    base, tensors = tuned(3)
    found = record(weight_of(tensors, base), names(3))
    changes = [tensor - base for tensor in tensors]
    assert found["moved"] == pytest.approx([float(change.norm()) for change in changes], rel=1e-5)
    assert found["norm"] == pytest.approx([float(tensor.norm()) for tensor in tensors], rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(changes[0].flatten(), changes[2].flatten(), 0)
    assert found["cosines"][0][2] == pytest.approx(float(cosine), rel=1e-4)
    assert found["apart"][1][2] == pytest.approx(float((tensors[1] - tensors[2]).norm()), rel=1e-5)
    around = record(weight_of(tensors), names(3))
    mean = torch.stack(tensors).mean(dim=0)
    assert around["moved"] == pytest.approx([float((t - mean).norm()) for t in tensors], rel=1e-5)


def test_overlap_is_the_share_of_common_rows() -> None:
    base = torch.zeros(26, 30)  # 8 % of which are two directions
    q = torch.linalg.qr(random(30, 30))[0]
    left = torch.linalg.qr(random(26, 26, seed=1))[0]
    one = left[:, :2] @ torch.diag(torch.tensor([2.0, 1.0])) @ q[:, :2].mT
    half = left[:, 2:4] @ torch.diag(torch.tensor([2.0, 1.0])) @ q[:, [0, 5]].mT
    found = record(weight_of([one, half], base), names(2))
    assert found["row_overlap"][0][1] == pytest.approx(0.5, abs=1e-4)
    assert found["column_overlap"][0][1] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_rank_four_are_told_in_whole_weights(dtype: torch.dtype) -> None:
    base = random(96, 128, seed=9).to(dtype) / 10
    tensors = [
        (base.float() + random(96, 4, seed=t) @ random(4, 128, seed=t + 7) / 20).to(dtype)
        for t in range(3)
    ]
    found = record(weight_of(tensors, base), names(3))
    assert found["rank"] == [4, 4, 4]
    assert all(rank is not None and rank <= 4 for rank in found["numerical_rank"])
    assert record(weight_of(tensors), names(3))["rank"] == [12, 12, 12]  # of their average, too


def test_full_fine_tuning_has_no_low_rank() -> None:
    base, tensors = tuned(3)
    assert record(weight_of(tensors, base), names(3))["rank"] == [None] * 3


def test_a_model_that_did_not_move_has_nothing_to_keep() -> None:
    base, tensors = tuned(2)
    found = record(weight_of([*tensors, base.clone()], base), names(3))
    assert found["moved"][2] == 0
    assert found["rank"][2] == 0
    assert found["energy"][2] is None
    assert found["cosines"][2][0] is None
    assert found["methods"][AVERAGE]["kept"][2] is None


def test_what_is_not_decomposed_has_norms_only() -> None:
    found = record(
        of_tensors("layers.0.norm.weight", [random(8, seed=1), random(8, seed=2)], names(2)),
        names(2),
    )
    assert not found["decomposed"]
    assert "methods" not in found
    assert found["moved"][0] > 0


def test_experts_and_kernels_are_measured_as_their_matrices() -> None:
    experts = [random(3, 16, 20, seed=t) for t in range(3)]
    found = record(of_tensors("layers.1.experts.up", experts, names(3)), names(3))
    assert found["shape"] == [3, 16, 20]
    kernels = [random(16, 4, 3, 3, seed=t) for t in range(3)]
    kernel = record(of_tensors("conv1.weight", kernels, names(3)), names(3))
    assert kernel["shape"] == [1, 16, 36]
    assert kernel["centred"]["R"][-1] < kernel["centred"]["R"][0]


def test_activations_say_what_is_measured_on_them() -> None:
    base, tensors = tuned(3)
    merged = tensors[0] * 0.5 + tensors[1] * 0.5
    inputs = random(32, 11, seed=77)
    found = record(weight_of(tensors, base, merged=merged), names(3), {1: Inputs(inputs)})
    got = found["methods"][MERGED]["measured"]
    own, answered = (tensors[1] - base) @ inputs, (merged - base) @ inputs
    lost = float((own - answered).square().sum() / own.square().sum())
    assert got["lost"][1] == pytest.approx(lost, rel=1e-4)
    assert got["lost"][0] is None
    assert got["own"][0] == 0


def test_turned_weights_and_stacks_are_measured_as_they_multiply() -> None:
    base, tensors = tuned(3)
    inputs = random(24, 11, seed=77)
    plain = record(weight_of(tensors, base), names(3), {1: Inputs(inputs, turned=True)})
    turned = record(weight_of([one.mT for one in tensors], base.mT), names(3), {1: Inputs(inputs)})
    found, expected = (one["methods"]["average"]["measured"] for one in (plain, turned))
    assert found["lost"][1] == pytest.approx(expected["lost"][1], rel=1e-4)
    assert plain["reach"] == [0, 1, 0]
    stacks = [random(3, 16, 20, seed=t) for t in range(3)]
    columns = torch.zeros(3, 20, 4)
    columns[0], columns[2, :, :2] = random(20, 4), random(20, 2, seed=5)
    start = random(3, 16, 20, seed=9)
    stack = record(
        of_tensors("experts.up", stacks, names(3), start), names(3), {0: Inputs(columns)}
    )
    own = (stacks[0] - start) @ columns
    got = stack["methods"]["average"]["measured"]["own"][0]
    assert got == pytest.approx(float(own.square().sum()), rel=1e-4)
    assert stack["reach"] == pytest.approx([2 / 3, 0, 0], rel=1e-5)


def test_activations_say_the_same_of_factors() -> None:
    base = random(40, 48, seed=99)
    factors = [(random(40, 4, seed=t), random(4, 48, seed=t + 50) / 20) for t in range(3)]
    inputs = {index: Inputs(random(48, 9, seed=index)) for index in range(3)}
    whole = record(weight_of([base + b @ a for b, a in factors], base), names(3), inputs)
    pairs = [Difference(b[None], a[None]) for b, a in factors]
    found = record(of_factors(NAME, (1, 40, 48), pairs), names(3), inputs)
    for method, entry in whole["methods"].items():
        got = found["methods"][method]["measured"]["lost"]
        assert got == pytest.approx(entry["measured"]["lost"], rel=5e-3), method


def test_a_merged_adapter_is_judged_beside_the_methods_and_moves_none_of_them() -> None:
    factors = [(random(40, 4, seed=t), random(4, 48, seed=t + 50)) for t in range(3)]
    pairs = [Difference(b[None], a[None]) for b, a in factors]
    alone = record(of_factors(NAME, (1, 40, 48), pairs), names(3))
    merged = Difference(random(40, 5, seed=8)[None], random(5, 48, seed=9)[None])
    found = record(of_factors(NAME, (1, 40, 48), pairs, merged), names(3))
    for method, entry in alone["methods"].items():
        assert found["methods"][method]["lost"] == pytest.approx(entry["lost"], rel=1e-3), method
    few = math.floor(0.08 * 40)
    total = merged.left[0] @ merged.right[0]
    expected = [answer(b @ a, total, few)[1] for b, a in factors]
    assert found["methods"][MERGED]["lost"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj")),
        ("encoder.layer.0.mlp.experts.5.fc1.weight", (0, "mlp.experts.fc1")),
        (
            "embeddings.patch_embeddings.projection.weight",
            (None, "embeddings.patch_embeddings.projection"),
        ),
        ("h.3.attn.c_attn.weight", (3, "attn.c_attn")),
    ],
)
def test_a_name_says_layer_and_module(name: str, expected: tuple[int | None, str]) -> None:
    assert place(name) == (None, *expected)


@pytest.mark.parametrize("has_base", [True, False])
def test_values_that_are_not_finite_are_refused_by_name(has_base: bool) -> None:
    base, tensors = tuned(3)
    tensors[1][2, 3] = math.nan
    with pytest.raises(CartError, match=f"{NAME}.*model1.*1 NaN"):
        weight_of(tensors, base if has_base else None)


def test_a_base_or_merged_model_that_is_broken_is_refused() -> None:
    base, tensors = tuned(3)
    broken = base.clone()
    broken[0, 0] = math.inf
    with pytest.raises(CartError, match="the base model"):
        weight_of(tensors, broken)
    with pytest.raises(CartError, match="the merged model"):
        weight_of(tensors, base, merged=broken)
    with pytest.raises(CartError, match="the merged model"):
        weight_of(tensors, base, merged=base[:5])
