"""The ready experiments: they compose, and decompose what the authors decompose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool
from fusion_bench.constants import DEFAULT_CONFIG_PATH
from fusion_bench.utils import import_object, instantiate
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cart_plugin.fusion_bench.experiments import checkout_folder
from cart_plugin.fusion_bench.selection import selection
from tests.fusion_bench import pools

FOLDER = Path(__file__).parents[2] / "configs" / "fusion_bench" / "experiment" / "cart"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
METHODS = Path(__file__).parents[2] / "cart_plugin" / "fusion_bench" / "conf" / "method"

# The authors' rank ratio and lambda.
SETTINGS = {
    "clip-vit-b32_8-tasks": (0.12, 2.0),
    "clip-vit-b32_14-tasks": (0.16, 1.5),
    "clip-vit-b32_20-tasks": (0.32, 1.9),
    "clip-vit-l14_8-tasks": (0.16, 3.0),
    "clip-vit-l14_14-tasks": (0.16, 1.25),
    "clip-vit-l14_20-tasks": (0.16, 1.0),
    "clip-vit-b32_8-tasks_adamerging": (0.16, 2.3),
    "clip-vit-b32_14-tasks_adamerging": (0.32, 2.8),
    "clip-vit-b32_20-tasks_adamerging": (0.32, 2.4),
    "clip-vit-l14_8-tasks_adamerging": (0.16, 3.0),
    "clip-vit-l14_14-tasks_adamerging": (0.16, 1.25),
    "clip-vit-l14_20-tasks_adamerging": (0.16, 1.0),
    # No settings of theirs: the plugin's own method.
    **{f"clip-vit-b32_{tasks}-tasks_auto": (None, "auto") for tasks in (8, 14, 20)},
    "gpt2_glue": (0.01, 1.3),
    "roberta-base_glue": (0.04, 1.6),
}
# Layers as transformers names them, from the authors' rule for the same networks: of CLIP all
# attention and MLP weights; of RoBERTa and GPT-2 all matrices but embeddings and classifiers.
DECOMPOSED = {
    "clip": (
        "CLIPVisionModel",
        "encoder.layers.{}.",
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        *("mlp.fc1", "mlp.fc2"),
    ),
    "gpt2": ("GPT2Model", "h.{}.", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "roberta": (
        "RobertaModel",
        "encoder.layer.{}.",
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def search_path() -> Iterator[None]:
    """Hydra as the program starts it."""
    with initialize_config_dir(str(DEFAULT_CONFIG_PATH), version_base=None):
        yield


def composed(*overrides: str) -> DictConfig:
    # What only a running program knows.
    known = ("path.log_dir=outputs", "path.work_dir=.", "fabric.loggers=null")
    config = compose("fabric_model_fusion", overrides=[*overrides, *known])
    OmegaConf.resolve(config)
    return config


def named_as_in(method: DictConfig) -> tuple[str, set[str]]:
    """The model class that an experiment is for, and what the authors decompose of a tiny one."""
    kind, layer, *parts = DECOMPOSED[method.decompose]
    prefix = ""
    for name in pools.random_model(kind, 0).state_dict():
        if "layers.0." in name or "layer.0." in name or name.startswith("h.0."):
            prefix = name.split(layer.format(0))[0]  # `vision_model.` in transformers 4
    return kind, {f"{prefix}{layer.format(n)}{part}.weight" for n in (0, 1) for part in parts}


def test_every_experiment_is_listed_here() -> None:
    assert set(EXPERIMENTS) == set(SETTINGS)
    assert checkout_folder() == FOLDER.parents[1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_with_the_authors_values_and_says_how_to_run_it(
    experiment: str,
) -> None:
    config = composed(f"+experiment=cart/{experiment}")
    text = (FOLDER / f"{experiment}.yaml").read_text(encoding="utf-8")

    assert f"fusion_bench +experiment=cart/{experiment}" in text
    assert (config.method.rank_ratio, config.method.scaling_factor) == SETTINGS[experiment]
    for part in (config.method, config.modelpool, config.taskpool):
        assert isinstance(import_object(part._target_), type)
    instantiate(config.method)  # its parameters are those of its class


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e.startswith("clip")])
def test_clip_experiment_has_its_suite(experiment: str) -> None:
    config = composed(f"+experiment=cart/{experiment}")
    tasks = [name for name in config.modelpool.models if name != "_pretrained_"]
    size = "large-patch14" if "l14" in experiment else "base-patch32"

    assert len(tasks) == int(experiment.split("_")[1].split("-")[0])
    assert list(config.taskpool.test_datasets) == tasks
    assert config.taskpool.base_model == f"openai/clip-vit-{size}"
    assert all(size in place for place in config.modelpool.models.values())


def test_an_experiment_can_be_run_with_another_method_or_task_pool() -> None:
    experiment = "+experiment=cart/clip-vit-b32_8-tasks"
    config = composed(experiment, "method=cart/indexing", "taskpool=dummy")
    assert config.taskpool._target_.endswith("DummyTaskPool")
    assert (config.method.decompose, config.method.switch) == ("clip", False)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_selects_what_the_authors_decompose(experiment: str) -> None:
    method = composed(f"+experiment=cart/{experiment}").method
    kind, expected = named_as_in(method)
    state = pools.random_model(kind, 0).state_dict()
    decompose = selection(method.decompose, list(state))

    assert {name for name, tensor in state.items() if decompose(name, tensor.shape)} == expected


@pytest.mark.parametrize("experiment", ["clip-vit-b32_8-tasks", "gpt2_glue", "roberta-base_glue"])
def test_all_else_is_averaged(experiment: str) -> None:
    method = composed(f"+experiment=cart/{experiment}").method
    kind, expected = named_as_in(method)
    held: dict[str, nn.Module] = {f"m{seed}": pools.random_model(kind, seed) for seed in range(3)}
    merged = instantiate(method).run(BaseModelPool(held)).state_dict()

    states = [model.state_dict() for model in held.values()]
    means = {name: torch.stack([state[name] for state in states]).mean(0) for name in merged}
    changed = {n for n, mean in means.items() if not torch.allclose(merged[n], mean, atol=1e-6)}
    assert changed == expected


def test_the_roberta_pool_loads_encoders_without_their_classifiers(tmp_path: Path) -> None:
    for seed, task in enumerate(("cola", "mnli")):
        model = pools.random_model("RobertaForSequenceClassification", seed, num_labels=2 + seed)
        model.save_pretrained(tmp_path / task)
    config = composed("modelpool=cart/roberta-base_glue", f"modelpool.folder={tmp_path}")
    pool = instantiate(config.modelpool)
    encoders = [pool.load_model(task) for task in ("cola", "mnli")]

    assert len(pool.model_names) == 8
    assert encoders[0].state_dict().keys() == encoders[1].state_dict().keys()
    assert not any("classifier" in n or "pooler" in n for n in encoders[0].state_dict())


def _method_configs() -> list[str]:
    found = (path.relative_to(METHODS).with_suffix("") for path in METHODS.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found)


@pytest.mark.parametrize("name", _method_configs())
def test_every_method_config_makes_its_method_and_knows_all_its_parameters(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = composed(f"method={name}").method
    method: Any = instantiate(config)

    assert type(method) is import_object(config._target_)
    assert "Unused argument" not in caplog.text  # FusionBench's answer to a parameter of no use
    assert set(method.config) >= {key for key in config if not key.startswith("_")}
