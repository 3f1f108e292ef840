"""Numbers of tokens in configs, by another tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cart_plugin.checkpoints.token_ids import entries, renumber

OLD = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<end>", 7: "<image>"}
NEW = {"</s>": 1, "<s>": 2, "<end>": 5, "<image>": 0}


def renumbered(special: dict[str, int] | None = None, **config: Any) -> dict[str, Any]:
    renumber(config, OLD, NEW, special or {})
    return config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": 1, "bos_token_id": 2}),
        ({"eos_token_id": [2, 3, 0]}, {"eos_token_id": [1, 5]}),
        ({"text_config": {"eos_token_id": 2}}, {"text_config": {"eos_token_id": 1}}),
        ({"a_config": {"image_token_index": 7}}, {"a_config": {"image_token_index": 0}}),
        (
            {"thinker_config": {"text_config": {"eos_token_id": 3}}},
            {"thinker_config": {"text_config": {"eos_token_id": 5}}},
        ),
        ({"suppress_tokens": [0, 3]}, {"suppress_tokens": [5]}),
        ({"forced_eos_token_id": 2}, {"forced_eos_token_id": 1}),
    ],
    ids=str,
)
def test_each_token_keeps_its_meaning(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert renumbered(**config) == expected


def test_what_is_gone_is_the_tokenizers_own_or_none() -> None:
    assert renumbered(pad_token_id=0, eos_token_id=[9]) == {
        "pad_token_id": None,
        "eos_token_id": None,
    }
    assert renumbered({"pad": 5, "eos": 1}, pad_token_id=0, eos_token_id=[9]) == {
        "pad_token_id": 5,
        "eos_token_id": [1],
    }
    assert renumbered({"eos": 1}, forced_eos_token_id=9) == {"forced_eos_token_id": 1}
    # A model of images cannot be without: null is not its token's number.
    assert renumbered(image_token_id=8, video_token_id=9) == {
        "image_token_id": 8,
        "video_token_id": 9,
    }


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": None, "pad_token_id": -1, "suppress_tokens": []},
        {"codebook_eos_token_id": 1, "tts_codec_pad_token_id": 2, "t2u_bos_token_id": 1},
        {"vocab_size": 2, "id2label": {"1": "a"}, "quantization_config": {"eos_token_id": 2}},
        {"eos_token_id": "</s>", "mm_tokens_per_image": 1},
    ],
    ids=str,
)
def test_what_is_no_number_of_a_token_stays(config: dict[str, Any]) -> None:
    assert renumbered(**copy.deepcopy(config)) == config


def test_entries_are_named_by_their_paths() -> None:
    found = entries({"eos_token_id": 1, "text_config": {"pad_token_id": [2]}})
    assert [(entry.path, entry.numbers) for entry in found] == [
        ("eos_token_id", [1]),
        ("text_config.pad_token_id", [2]),
    ]
