"""Bad input ends a merge with exit code 1, a message, and no output that looks whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.scripts import run_yaml

from tests.mergekit.helpers import (
    DOWN,
    HIDDEN,
    LAYERS,
    QUERY,
    QUIET,
    Tensors,
    edit,
    fails,
    invoke,
    put,
)
from tests.support import random


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_end_the_merge(
    value: float, own: list[str], tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[DOWN.format(4)][3, 3] = value

    edit(own[1], spoil)
    where = f"tensor '{DOWN.format(4)}' of {own[1]} holds 1 NaN or infinite values out of 2048"
    fails(tmp_path, own, where)


def test_values_beyond_fp16_are_not_the_checkpoints_fault(own: list[str], tmp_path: Path) -> None:
    for folder in own:
        edit(folder, lambda held: {name: tensor.bfloat16() for name, tensor in held.items()})
        edit(folder, lambda held: held | {DOWN.format(4): held[DOWN.format(4)] + 7e4})
    reason = "values beyond 65504 do not fit float16: if the checkpoint is stored in another dtype"
    fails(tmp_path, own, f"of {own[0]} holds 2048", reason, "bfloat16 or float32", dtype="float16")
    result = invoke(run_yaml.main, tmp_path, own, *QUIET, dtype="bfloat16")
    assert result.exit_code == 0


def test_shapes_that_differ_end_the_merge(own: list[str], tmp_path: Path) -> None:
    put(own[1], DOWN.format(1), torch.ones(HIDDEN, 65))
    fails(tmp_path, own, f"Tensor size mismatch for {DOWN.format(1)}", "(32, 64), (32, 65)")


def test_vocabularies_that_differ_end_the_merge(own: list[str], tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"
    put(own[2], table, torch.ones(70, HIDDEN))
    fails(tmp_path, own, f"Tensor size mismatch for {table}", "tokenizer")


def test_a_missing_tensor_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors[QUERY.format(2)]

    edit(own[1], drop)
    fails(tmp_path, own, f"Tensor {QUERY.format(2)} required but not present", own[1])


def test_a_truncated_file_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    file = Path(own[1]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    fails(tmp_path, own)


def test_integer_weights_end_the_merge(own: list[str], tmp_path: Path) -> None:
    for index, folder in enumerate(own):
        integers = torch.full((HIDDEN, HIDDEN), index, dtype=torch.int8)
        put(folder, QUERY.format(1), integers)
    fails(tmp_path, own, QUERY.format(1), "torch.int8 weights", "dequantise")


def test_one_model_ends_the_merge(llamas: list[str], tmp_path: Path) -> None:
    message = "cart needs at least two fine-tuned models beside the base model"
    fails(tmp_path, llamas[:1], message, f"got 1: {llamas[0]}")
    fails(tmp_path, llamas[:1], message, f"got 1: {llamas[0]}", base_model=llamas[1])
    fails(tmp_path, llamas[:2], message, f"got 1: {llamas[1]}", base_model=llamas[0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": "abc"}, "rank_ratio must be a number, got 'abc'"),
        ({"rank_ratio": [0.1, 2]}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank": 4, "energy": 0.9}, "rank=4 and energy=0.9 are two rank rules at once"),
        ({"center": "base"}, "center is 'base', but there is no base model"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, subspace, sketch, got 'quick'"),
        ({"lambda": "much"}, "lambda must be a number, got 'much'"),
        ({"weight": 0}, "weights must sum to more than 0, got [0.0, 0.0, 0.0]"),
        ({"weight": "some"}, "weight must be a number, got 'some'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
    ids=repr,
)
def test_bad_parameters_end_the_merge(
    parameters: dict[str, Any], message: str, llamas: list[str], tmp_path: Path
) -> None:
    fails(tmp_path, llamas[:3], message, parameters=parameters)


def test_parameters_are_checked_before_anything_is_merged(
    llamas: list[str], tmp_path: Path
) -> None:
    last = QUERY.format(LAYERS - 1)
    for name, value in (("rank_ratio", 2), ("lambda", "x"), ("svd", "quick"), ("rank", -1)):
        parameters = {name: [{"filter": last, "value": value}]}
        fails(tmp_path, llamas[:3], name, parameters=parameters)
        assert not (tmp_path / "out").exists()


def test_an_unknown_method_beside_ours_ends_the_merge(llamas: list[str], tmp_path: Path) -> None:
    fails(tmp_path, llamas[:3], "carrt", merge_method="carrt")


def test_a_result_beyond_half_precision_ends_the_merge(own: list[str], tmp_path: Path) -> None:
    for index, folder in enumerate(own):
        large = (6e4 * random(HIDDEN, HIDDEN, seed=index).sign()).half()
        put(folder, QUERY.format(0), large)
    message = "the merged values leave the range of torch.float16"
    fails(tmp_path, own, message, QUERY.format(0), parameters={"lambda": 9.0})


def test_a_failed_merge_leaves_no_finished_folder_even_with_small_shards(
    own: list[str], tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[QUERY.format(LAYERS - 1)][0, 0] = math.nan

    edit(own[0], spoil)
    result = invoke(run_yaml.main, tmp_path, own, "--out-shard-size", "20K", "--async-write")
    assert result.exit_code == 1
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.index.json"))
