"""Tiny local models and inputs for FusionBench's pools: three tasks, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from omegaconf import DictConfig
from PIL import Image
from torch import nn

transformers.utils.logging.disable_progress_bar()

TASKS = ("mnist", "svhn", "cifar10")
PRETRAINED = "_pretrained_"
_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_PATCHES: dict[str, Any] = {**_ENCODER, "image_size": 16, "patch_size": 8}
_HERE = "tests.fusion_bench.tiny"


def perturbed(model: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    """The model, with noise on all parameters: another fine-tuned one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def images(seed: int, count: int = 12) -> list[dict[str, Any]]:
    """A data set of noise."""
    random = np.random.default_rng(seed)
    return [
        {"image": Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)), "label": 0}
        for _ in range(count)
    ]


def texts(seed: int, count: int = 12) -> list[dict[str, Any]]:
    """A data set of random tokens, the last of them padding."""
    ids = torch.randint(2, 30, (count, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    return [{"input_ids": row * mask, "attention_mask": mask} for row in ids]


def nothing() -> None:
    """In the place of a tokenizer."""


def data_sets(kind: str) -> DictConfig:
    """Configs of test data sets for all tasks."""
    return DictConfig({t: {"_target_": f"{_HERE}.{kind}", "seed": i} for i, t in enumerate(TASKS)})


def image_processor(folder: Path) -> Path:
    """Save a processor for 16 x 16 images."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def _saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def dinov2(seed: int, classes: int = 10) -> Any:
    """A random DINOv2 with a head of its own; without one for no classes."""
    config = transformers.Dinov2Config(
        **{k: v for k, v in _PATCHES.items() if k != "intermediate_size"},
        mlp_ratio=2,
        num_labels=classes,
        layerscale_value=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2ForImageClassification(config)
    perturbed(model, seed)
    if classes:  # heads that are sure of something: an entropy to lower
        torch.nn.init.normal_(
            model.classifier.weight, generator=torch.Generator().manual_seed(seed)
        )
    return model


def convolutional(kind: str, seed: int) -> Any:
    """A random ConvNeXt or ResNet with a head of its own, and statistics of batch norms."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 10}
    config, cls = {
        "convnext": (transformers.ConvNextConfig, transformers.ConvNextForImageClassification),
        "resnet": (transformers.ResNetConfig, transformers.ResNetForImageClassification),
    }[kind]
    extra = {"num_stages": 2, "patch_size": 2} if kind == "convnext" else {"embedding_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**sizes, **extra))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "running_mean" in name:
            buffer += seed
    return perturbed(model, seed)


def image_pool(
    folder: Path, kind: str = "dinov2", *, classes: int = 10, pretrained: bool = True
) -> Any:
    """A pool for image classification on saved models."""
    from fusion_bench import modelpool

    names = [*TASKS, *([PRETRAINED] if pretrained else [])]
    models = {}
    for seed, name in enumerate(names):
        model = dinov2(seed, classes) if kind == "dinov2" else convolutional(kind, seed)
        models[name] = _saved(model, image_processor(folder / name))
    cls = {"dinov2": "Dinov2", "convnext": "ConvNext", "resnet": "ResNet"}[kind]
    return getattr(modelpool, f"{cls}ForImageClassificationPool")(
        models=DictConfig(models),
        test_datasets=data_sets("images"),
        **({"type": "transformers"} if kind == "resnet" else {}),
    )


def clip_pool(folder: Path, *, pretrained: bool = True) -> Any:
    """A CLIP pool on saved vision models and a CLIP with a tiny vocabulary."""
    from fusion_bench.modelpool import CLIPVisionModelPool

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    path = image_processor(folder / PRETRAINED)
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = transformers.CLIPConfig(
        text_config={
            **_ENCODER,
            "vocab_size": len(words),
            "max_position_embeddings": 128,
            "eos_token_id": len(words) - 1,
        },
        vision_config=_PATCHES,
        projection_dim=16,
    )
    models = {}
    for index, task in enumerate(TASKS):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clip = transformers.CLIPModel(config)
        if index == 0:
            _saved(clip, path)
        vision = transformers.CLIPVisionModel(config.vision_config)
        vision.load_state_dict(transformers.CLIPVisionModel.from_pretrained(path).state_dict())
        models[task] = _saved(perturbed(vision, index), folder / task)
    if pretrained:
        models[PRETRAINED] = str(path)
    return CLIPVisionModelPool(
        DictConfig(models), processor=str(path), test_datasets=data_sets("images")
    )


def gpt2_pool(folder: Path) -> Any:
    """A GPT-2 pool on saved classifiers."""
    from fusion_bench.modelpool import GPT2ForSequenceClassificationPool

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, pad_token_id=0, num_labels=3
    )
    models = {}
    for index, task in enumerate(TASKS):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = perturbed(transformers.GPT2ForSequenceClassification(config), index, 0.1)
        models[task] = {
            "_target_": "transformers.GPT2Model.from_pretrained",
            "pretrained_model_name_or_path": _saved(model, folder / task),
        }
    return GPT2ForSequenceClassificationPool(
        DictConfig({"_target_": f"{_HERE}.nothing"}),
        models=DictConfig(models),
        test_datasets=data_sets("texts"),
    )


def t5_pool(folder: Path) -> Any:
    """A T5 pool on saved models, whose embeddings are tied."""
    from fusion_bench.modelpool import Seq2SeqLMPool

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32
    )
    models = {}
    for index, task in enumerate(TASKS):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = perturbed(transformers.T5ForConditionalGeneration(config), index)
        models[task] = {
            "_target_": "transformers.T5ForConditionalGeneration.from_pretrained",
            "pretrained_model_name_or_path": _saved(model, folder / task),
        }
    return Seq2SeqLMPool(DictConfig(models), tokenizer=None, test_datasets=data_sets("texts"))
