"""FusionBench runs of the suite in one process: many merges, one import of its libraries.

A run is a list of Hydra overrides, and `command` says how to repeat it with `fusion_bench`. Config,
pools and method are composed and built by FusionBench itself, as its program does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.common.cache import MANIFEST
from benchmarks.vision.pool import conf_argument, suite_folder

State = dict[str, Tensor]
SINGLE = ""  # the name of the only model, where a method gives one for all tasks


@dataclass
class Merged:
    """What a method returned, as tensors.

    Attributes:
        states: one state dict, named `SINGLE`, or one a task.
        seconds: what FusionBench's method took, with loading the models.
        extra: what else the method reports, such as CART-Indexing's storage.
    """

    states: dict[str, State]
    seconds: float
    extra: dict[str, Any]


def command(overrides: Sequence[str]) -> str:
    """The shell command that does the same run."""
    words = [shlex.quote(word) for word in overrides]
    return " ".join(["fusion_bench", "--config-dir", conf_argument(), "+experiment=vision", *words])


def program(overrides: Sequence[str]) -> Any:
    """FusionBench's program with the config of `command(overrides)`; nothing is loaded yet."""
    from cart_plugin.fusion_bench.compat import prepare

    prepare()
    import fusion_bench  # noqa: F401 - our search path plugin looks for it
    from fusion_bench.utils import instantiate
    from fusion_bench.utils.hydra_utils import get_default_config_path
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    conf = f"file://{suite_folder() / 'conf'}"
    root = str(Path(get_default_config_path()).resolve())
    with initialize_config_dir(root, version_base=None):
        config = compose(
            "fabric_model_fusion",
            [f"hydra.searchpath=[{conf}]", "+experiment=vision", *overrides],
        )
    # Both interpolate into what only Hydra's own command line knows.
    config.path.log_dir, config.path.work_dir = "outputs", "."
    OmegaConf.resolve(config)
    return instantiate(config)


def merge(overrides: Sequence[str]) -> Merged:
    """Run a method of FusionBench on the suite's pool.

    Raises:
        Exception: whatever the method raises.
    """
    with quiet():
        run = program(overrides)
        run._taskpool = None  # evaluated later, and perhaps several times
        started = time.perf_counter()
        merged = run.run()["merged_model"]
        seconds = time.perf_counter() - started
        states, extra = _states(merged)
    return Merged(states, seconds, extra)


def _states(merged: Any) -> tuple[dict[str, State], dict[str, Any]]:
    """Tensors of whatever a method returned: a model, one that switches, or one with modulators."""
    from fusion_bench.models.modulator import ModulatedModel
    from fusion_bench.models.wrappers.switch import SwitchModule

    if isinstance(merged, Mapping):
        models = {name: item for name, item in merged.items() if isinstance(item, nn.Module)}
        if len(models) != 1:
            raise ValueError(f"expected one model, the method returned {', '.join(models)}")
        rest = {name: item for name, item in merged.items() if name not in models}
        states, extra = _states(next(iter(models.values())))
        return states, {**extra, **rest}
    if isinstance(merged, SwitchModule):
        return {name: _copy(model) for name, model in merged._option_modules.items()}, {}
    if isinstance(merged, ModulatedModel):
        states = {}
        for task in merged.modulators:
            merged.set_task(task)
            states[task] = _copy(merged.backbone)
        return states, {}
    return {SINGLE: _copy(merged)}, {}


def _copy(model: nn.Module) -> State:
    """The encoder's tensors: AdaMerging also returns the heads, which the task pool has, too."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("classifier.")
    }


def evaluate(states: Mapping[str, State], overrides: Sequence[str]) -> dict[str, float]:
    """Accuracy by task of merged tensors, with the task pool of `command(overrides)`.

    The tensors go into freshly loaded models: those of FusionBench's DINOv2 pool keep their
    original's `forward` when they are copied, so a method that returns a copy would have its
    unmerged original evaluated.

    Args:
        states: as in `Merged`; one a task is switched by the task.
        overrides: pools and splits (the method is not used).
    """
    from fusion_bench.models.wrappers.switch import SwitchModule

    with quiet():
        run, pool, tasks = _pools(tuple(overrides), (suite_folder() / MANIFEST).stat().st_mtime_ns)
        models = {name: _loaded(pool, state) for name, state in states.items()}
        model = models[SINGLE] if list(models) == [SINGLE] else SwitchModule(models)
        report = run.evaluate_merged_model(tasks, model)
    return {name: float(report[name]["accuracy"]) for name in run._taskpool.test_datasets}


@lru_cache(maxsize=2)
def _pools(overrides: tuple[str, ...], _stamp: int) -> tuple[Any, Any, Any]:
    """Program, model pool and task pool, kept for the next model of the same suite."""
    run = program(overrides)
    pool = run._instantiate_and_setup(run._modelpool)
    return run, pool, run._instantiate_and_setup(run._taskpool)


def _loaded(pool: Any, state: State) -> nn.Module:
    model: nn.Module = pool.load_pretrained_model()
    model.load_state_dict(state)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """FusionBench prints and logs each tensor; a suite of some hundred merges shows its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # A real file: FusionBench asks for its descriptor.
        with (
            open(os.devnull, "w") as sink,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            yield
    finally:
        logging.disable(before)
