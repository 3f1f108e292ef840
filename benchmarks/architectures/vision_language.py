"""Tiny vision-language models, with the processors that can be built without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from benchmarks.architectures.models import DECODER, PATCHES, WORDS, Architecture
from benchmarks.common.cache import write_json

_IMAGE = 90  # the image token's id
_TEXT = {**DECODER, "hidden_size": 32, "intermediate_size": 64}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOKENS = {
    "image_token_id": _IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_TEXT = {**_TEXT, "rope_parameters": _ROPE}


def _two(config: str, text: str, vision: str, **text_settings: Any) -> Any:
    """Makes the config of a model from its parts' classes."""

    def make(**settings: Any) -> Any:
        return getattr(transformers, config)(
            text_config=getattr(transformers, text)(**_TEXT, **text_settings),
            vision_config=getattr(transformers, vision)(**PATCHES),
            **settings,
        )

    return make


def tokenizer(special: dict[str, str]) -> Any:
    """A tokenizer of words, with special tokens by their names, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{number}": number for number in range(3, WORDS - len(special))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=special,
    )
    made.chat_template = "{{ messages }}"
    return made


def _processor(name: str, images: str, special: dict[str, str], **settings: Any) -> Any:
    """Writes the files of a processor into a folder."""

    def write(folder: Path) -> None:
        made = getattr(transformers, images)()
        made.image_seq_length = 4
        kind = getattr(transformers, name)
        processor = kind(image_processor=made, tokenizer=tokenizer(special), **settings)
        processor.save_pretrained(folder)

    return write


def _files(name: str, images: str) -> Any:
    """Writes the files of a processor that only torchvision can make, in the older form."""

    def write(folder: Path) -> None:
        tokenizer({}).save_pretrained(folder)
        for file, content in {
            "preprocessor_config.json": {"image_processor_type": images, "processor_class": name},
            "video_preprocessor_config.json": {"processor_class": name},
            "processor_config.json": {"processor_class": name},
            "chat_template.json": {"chat_template": "{{ messages }}"},
        }.items():
            write_json(folder / file, content)

    return write


MODELS = {
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            **_QWEN_TOKENS,
            "text_config": _QWEN_TEXT,
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
        },
        processor=_files("Qwen2VLProcessor", "Qwen2VLImageProcessor"),
    ),
    "Qwen2.5-VL": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {
            **_QWEN_TOKENS,
            "text_config": _QWEN_TEXT,
            "vision_config": {
                **_QWEN_VISION,
                "intermediate_size": 64,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
        },
        processor=_files("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"),
    ),
    "Qwen3-VL": Architecture(
        "Qwen3VLForConditionalGeneration",
        {
            **_QWEN_TOKENS,
            "text_config": {**_QWEN_TEXT, "head_dim": 8},
            "vision_config": {
                **_QWEN_VISION,
                "depth": 3,
                "intermediate_size": 64,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0, 1, 2],
                "num_position_embeddings": 64,
            },
        },
        processor=_files("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
    ),
    "Gemma 3": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "head_dim": 8},
            "vision_config": PATCHES,
            "mm_tokens_per_image": 4,
            "image_token_index": _IMAGE,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        processor=_processor(
            "Gemma3Processor",
            "Gemma3ImageProcessor",
            {
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
            image_seq_length=4,
        ),
    ),
    "LLaVA": Architecture(
        "LlavaForConditionalGeneration",
        {"image_token_index": _IMAGE},
        _two("LlavaConfig", "LlamaConfig", "CLIPVisionConfig"),
        _processor(
            "LlavaProcessor",
            "CLIPImageProcessor",
            {"image_token": "<image>"},
            patch_size=8,
            vision_feature_select_strategy="default",
        ),
    ),
    "PaliGemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        {"image_token_index": _IMAGE, "projection_dim": 32},
        _two("PaliGemmaConfig", "GemmaConfig", "SiglipVisionConfig", head_dim=8),
        _processor("PaliGemmaProcessor", "SiglipImageProcessor", {"image_token": "<image>"}),
    ),
    "Idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": PATCHES,
            "scale_factor": 2,
            "image_token_id": _IMAGE,
        },
        processor=_processor(
            "Idefics3Processor",
            "Idefics3ImageProcessor",
            {
                "image_token": "<image>",
                "fake_image_token": "<fake_token_around_image>",
                "end_of_utterance_token": "<end_of_utterance>",
            },
            image_seq_len=4,
        ),
    ),
    "SmolVLM": Architecture(
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": PATCHES,
            "scale_factor": 2,
            "image_token_id": _IMAGE,
        },
        processor=_files("SmolVLMProcessor", "SmolVLMImageProcessor"),
    ),
    "Mistral3": Architecture(
        "Mistral3ForConditionalGeneration",
        {"image_token_index": _IMAGE, "spatial_merge_size": 2},
        _two("Mistral3Config", "MistralConfig", "PixtralVisionConfig", head_dim=8),
        _files("PixtralProcessor", "PixtralImageProcessor"),
    ),
}
"""Vision-language models by the names of the table."""
