"""The suite as FusionBench sees it: one folder with models, heads and Hydra configs.

`write_suite` lays it out in the cache, whole or not at all:

    suite/conf/experiment/vision.yaml            what the command below composes
    suite/conf/{modelpool,taskpool}/vision.yaml
    suite/seed0/pretrained, suite/seed0/mnist    encoders without classifier (weights are links)
    suite/seed0/mnist/classifier                 encoder and frozen head as one model

Then every run is a plain command, from any folder:

    fusion_bench --config-dir ~/.cache/cart-plugin/suite/conf +experiment=vision method=cart
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset, TensorDataset

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.vision.heads import link, pixels
from benchmarks.vision.tasks import load_split

WEIGHTS = "model.safetensors"
ADAPTING_IMAGES = 256  # a task, for the methods that need data


def suite_folder() -> Path:
    """Where the suite is kept."""
    return cache_root() / "suite"


def conf_argument() -> str:
    """The configs' folder as a command line names it, without this machine's paths."""
    root = "$CART_CACHE" if os.environ.get("CART_CACHE") else "~/.cache/cart-plugin"
    return f"{root}/suite/conf"


def write_suite(encoders: Mapping[int, Mapping[str, Path]], pretrained: Path) -> Path:
    """Lay the suite out unless it is there with these very encoders; return its folder.

    Args:
        encoders: fine-tuned encoders by seed and task, the same tasks for every seed.
        pretrained: the encoder that they started from.
    """
    folder = suite_folder()
    content = {
        "pretrained": pretrained.name,
        "encoders": {
            str(seed): {task: path.name for task, path in of_seed.items()}
            for seed, of_seed in encoders.items()
        },
        "format": 4,
    }
    if read_manifest(folder) == content:
        return folder
    with new_folder(folder) as target:
        for seed, of_seed in encoders.items():
            _copy_encoder(pretrained, target / f"seed{seed}" / "pretrained")
            for task, path in of_seed.items():
                _copy_encoder(path, target / f"seed{seed}" / task)
                shutil.copytree(
                    path / "classifier",
                    target / f"seed{seed}" / task / "classifier",
                    copy_function=link,
                )
        for name, config in configs(list(next(iter(encoders.values()))), folder).items():
            path = target / "conf" / f"{name}.yaml"
            path.parent.mkdir(parents=True)
            head = "# @package _global_\n" if name.startswith("experiment/") else ""
            path.write_text(head + yaml.safe_dump(config, sort_keys=False))
        write_json(target / MANIFEST, content)
    return folder


def _copy_encoder(source: Path, target: Path) -> None:
    """An encoder folder that loads as a `Dinov2ForImageClassification` without classifier."""
    target.mkdir(parents=True)
    link(source / WEIGHTS, target / WEIGHTS)
    shutil.copy2(source / "preprocessor_config.json", target)
    config = json.loads((source / "config.json").read_text())
    # No labels: the classifier becomes the identity, and the model gives the heads' features.
    config |= {"architectures": ["Dinov2ForImageClassification"], "id2label": {}, "label2id": {}}
    write_json(target / "config.json", config)


def configs(tasks: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The Hydra configs by name, for a suite in `folder`."""
    place = f"{folder}/seed${{modelpool.seed}}"
    images = {"_target_": f"{__name__}.images"}

    def data(split: str, count: int | str) -> dict[str, Any]:
        return {task: images | {"task": task, "split": split, "count": count} for task in tasks}

    modelpool = {
        "_target_": "fusion_bench.modelpool.Dinov2ForImageClassificationPool",
        "_recursive_": False,
        "seed": 0,  # of the fine-tuning
        "models": {
            name: {"config_path": f"{place}/{model}", "pretrained": True}
            for name, model in {"_pretrained_": "pretrained", **{t: t for t in tasks}}.items()
        },
        "train_datasets": data("train", ADAPTING_IMAGES),
        # What AdaMerging adapts to, without labels. Not the test images, as its paper has it: no
        # other method here sees those.
        "test_datasets": data("validation", ADAPTING_IMAGES),
    }
    taskpool = {
        "_target_": "benchmarks.vision.extra.TaskPool",
        "_recursive_": False,
        "split": "test",
        "images": 500,  # of each task
        "precision": "fp32",
        "test_datasets": data("${taskpool.split}", "${taskpool.images}"),
        "heads": {task: f"{place}/{task}/classifier" for task in tasks},
        "processor": None,  # `images` gives what the model takes
        "dataloader_kwargs": {"batch_size": 100, "num_workers": 0},
    }
    experiment = {
        "defaults": [{"override /modelpool": "vision"}, {"override /taskpool": "vision"}],
        "seed": 0,  # of the methods that draw
        "fabric": {"loggers": None, "accelerator": "cpu"},
        "report_save_path": None,
        "print_config": False,
        "print_function_call": False,
    }
    return {
        "modelpool/vision": modelpool,
        "taskpool/vision": taskpool,
        "experiment/vision": experiment,
    }


@lru_cache(maxsize=64)
def images(task: str, split: str, count: int) -> Dataset[tuple[torch.Tensor, ...]]:
    """Normalised images (3, 56, 56) with labels: the first `count` of a split.

    Kept in memory: a suite evaluates some hundred models on the same images.
    """
    data = load_split(task, split).head(count)
    return TensorDataset(pixels(data.images), torch.from_numpy(data.labels))
