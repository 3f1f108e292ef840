"""Tiny models, heads and data on disk, and Hydra configs of pools that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

SIZE = 32  # pixels a side
TASKS = ("mnist", "shapes", "dtd-like")  # one that FusionBench knows, and two that it does not
CLASSES = {"mnist": 10, "shapes": 3, "dtd-like": 4}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_IMAGES = {"image_size": SIZE, "patch_size": 16}
_TEXTS = {"vocab_size": 64, "max_position_embeddings": 48}


def random_model(kind: str, seed: int, **config: Any) -> nn.Module:
    """A transformers model with all parameters random, norms and biases too."""
    settings: dict[str, dict[str, Any]] = {
        "Dinov2ForImageClassification": {
            **{key: value for key, value in _ENCODER.items() if key != "intermediate_size"},
            **_IMAGES,
            "num_labels": 0,
        },
        "CLIPVisionModel": {**_ENCODER, **_IMAGES},
        "RobertaModel": {**_ENCODER, **_TEXTS},
        "RobertaForSequenceClassification": {**_ENCODER, **_TEXTS},
        "GPT2Model": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
        "LlamaForCausalLM": {**_ENCODER, **_TEXTS, "num_key_value_heads": 2},
    }
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extra = {"add_pooling_layer": False} if kind == "RobertaModel" else {}
        model = model_class(model_class.config_class(**{**settings[kind], **config}), **extra)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def save_head(folder: Path, classes: int, features: int = 64, seed: int = 0) -> Path:
    """A head as `benchmarks.vision` writes it: ``head.safetensors``."""
    folder.mkdir(parents=True)
    weight = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
    tensors = {"classifier.weight": weight, "classifier.bias": torch.zeros(classes)}
    save_file(tensors, folder / "head.safetensors")
    return folder


def save_images(folder: Path, classes: int, count: int = 6) -> Path:
    """A data set of random images, for `datasets.load_from_disk`."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    random = np.random.default_rng(classes)
    rows = {
        "image": [
            Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
            for _ in range(count)
        ],
        "label": [number % classes for number in range(count)],
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=classes)})
    Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def save_image_processor(folder: Path) -> None:
    """A `preprocessor_config.json` beside a model."""
    size = {"height": SIZE, "width": SIZE}
    transformers.BitImageProcessor(size=size, do_resize=True, do_center_crop=False).save_pretrained(
        folder
    )


def save_config(folder: Path, group: str, config: dict[str, Any]) -> None:
    """A Hydra config ``group=tiny`` in a folder for ``--config-dir``."""
    (folder / group).mkdir(parents=True)
    (folder / group / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def dinov2_pools(folder: Path) -> Path:
    """Three DINOv2 encoders with a head and a data set each; the folder of the configs."""
    models = {}
    for seed, task in enumerate(TASKS):
        place = folder / "encoders" / task
        random_model("Dinov2ForImageClassification", seed).save_pretrained(place)
        save_image_processor(place)
        models[task] = str(place)
        save_head(folder / "heads" / task, CLASSES[task], seed=seed)
        save_images(folder / "data" / task, CLASSES[task])
    configs = folder / "conf"
    save_config(
        configs,
        "modelpool",
        {
            "_target_": "fusion_bench.modelpool.Dinov2ForImageClassificationPool",
            "_recursive_": False,
            "models": models,
        },
    )
    save_config(
        configs,
        "taskpool",
        {
            "defaults": [{"cart@_here_": "image_classification"}, "_self_"],
            "processor": models["mnist"],
            "heads": {task: str(folder / "heads" / task) for task in TASKS},
            "test_datasets": {task: _on_disk(folder / "data" / task) for task in TASKS},
        },
    )
    return configs


def clip_pools(folder: Path) -> Path:
    """Three CLIP vision models, a whole CLIP model and two data sets; the folder of the configs."""
    vision, text = {**_ENCODER, **_IMAGES}, {**_ENCODER, "vocab_size": 600}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**text, "eos_token_id": 1}, projection_dim=16
    )
    models = {}
    for seed, task in enumerate(("_pretrained_", "mnist", "svhn", "gtsrb")):
        torch.manual_seed(seed)
        transformers.CLIPModel(config).save_pretrained(folder / task)
        models[task] = str(folder / task)
    base = folder / "_pretrained_"
    size = {"height": SIZE, "width": SIZE}
    transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=_clip_tokenizer(folder),
    ).save_pretrained(base)
    data = {task: _on_disk(save_images(folder / "data" / task, 10)) for task in ("mnist", "svhn")}
    configs = folder / "conf"
    save_config(
        configs,
        "modelpool",
        {
            "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
            "_recursive_": False,
            "models": models,
            "processor": str(base),
        },
    )
    save_config(
        configs,
        "taskpool",
        {
            "defaults": [{"CLIPVisionModelTaskPool@_here_": "_template"}, "_self_"],
            "_target_": "cart_plugin.fusion_bench.taskpool.CLIPVisionModelTaskPool",
            "base_model": str(base),
            "test_datasets": data,
            "dataloader_kwargs": {"num_workers": 0, "batch_size": 4, "pin_memory": False},
        },
    )
    return configs


def language_pools(folder: Path) -> Path:
    """Three Llamas, a tokenizer apart from them, a task of lm-eval; the folder of the configs."""
    models = {}
    for seed in range(3):
        models[f"llama{seed}"] = str(folder / str(seed))
        random_model("LlamaForCausalLM", seed).save_pretrained(folder / str(seed))
    configs = folder / "conf"
    save_config(
        configs,
        "modelpool",
        {
            "_target_": "fusion_bench.modelpool.CausalLMPool",
            "_recursive_": False,
            "models": models,
            "tokenizer": str(save_tokenizer(folder / "tokenizer")),
        },
    )
    save_config(
        configs,
        "taskpool",
        {
            "defaults": [{"cart@_here_": "lm_eval"}, "_self_"],
            "tasks": ["tiny_choice"],
            "include_path": str(save_language_task(folder / "tasks")),
            "batch_size": 2,
            "limit": 4,
            "bootstrap_iters": 0,
        },
    )
    return configs


def save_language_model(folder: Path, seed: int = 0) -> Path:
    """A Llama with its tokenizer."""
    random_model("LlamaForCausalLM", seed).save_pretrained(folder)
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words."""
    words = {"<unk>": 0, "</s>": 1} | {f"word{number}": number for number in range(2, 64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=48
    ).save_pretrained(folder)
    return folder


def save_language_task(folder: Path) -> Path:
    """The folder of a multiple-choice task ``tiny_choice`` for lm-eval, with its data."""
    folder.mkdir(parents=True)
    lines = [{"text": f"word{n} word{n + 1}", "answer": n % 2} for n in range(2, 8)]
    data = folder / "tiny.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": ["word9", "word10"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def _on_disk(folder: Path) -> dict[str, str]:
    return {"_target_": "datasets.load_from_disk", "dataset_path": str(folder)}


def _clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer that knows single letters only."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
