"""The text suite through FusionBench: methods that mergekit has not, tuned as mergekit's are.

Encoders of a sequence classification pool, a head a task outside of them. Each merge is one
`fusion_bench` command that saves a folder, and `compare` judges the folders beside its own rows:
settings are chosen on the validation texts of the first seed, among at most eight.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.common.beside import WEIGHTS
from benchmarks.common.cache import (
    MANIFEST,
    new_folder,
    read_manifest,
    settings_hash,
    write_json,
)
from benchmarks.common.fusion import Method, Point, between
from benchmarks.common.measure import CommandError, measure
from benchmarks.common.provenance import installed
from benchmarks.common.record import Record, revisions
from benchmarks.text.evaluator import validation
from benchmarks.text.finetune import FineTuning, task_head_folder

OURS = ("linalg", "merging")  # the rooms that decide what CART's rows give
ADAPTING_TEXTS = 256  # a task, for AdaMerging
_SCALES = (0.5, 0.7, 0.85, 1.0, 1.3, 1.5, 1.75, 2.0)
_LARGE_SCALES = (0.7, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0)  # Iso's best were at the end of those
_OWN = "method._target_=benchmarks.text.adaptation"
_ADAPTING = (
    "+method.heads=${modelpool.heads}",
    "+method.max_steps=20",
    "+method.batch_size=8",
    "+method.merging_weights_save_path=null",
    "+method.lr=0.01",
)
# By the name of the table's row.
METHODS = {
    "tsv-m": Method(
        "TSV-M",
        "task_singular_vector/TaskSingularVectorMerging",
        (),
        {"alpha": _SCALES},
        "alpha",
    ),
    "iso-c": Method(
        "Iso-C",
        "isotropic_merging/iso_c",
        (),
        {"scaling_factor": _LARGE_SCALES},
        "scaling_factor",
    ),
    "iso-cts": Method(
        "Iso-CTS",
        "isotropic_merging/iso_cts",
        (),
        {"scaling_factor": _LARGE_SCALES},
        "scaling_factor",
    ),
    "wudi": Method(
        "WUDI",
        "wudi/wudi",
        ("method._target_=benchmarks.common.algorithms.GramWUDI",),
        {"iter_num": (100, 300, 1000)},
    ),
    "adamerging": Method(
        "AdaMerging",
        "dummy",
        (f"{_OWN}.TextAdaMerging", *_ADAPTING, "+method.init_values=0.3"),
        {"init_values": (0.15, 0.3), "lr": (0.003, 0.01, 0.03)},
        data="unlabelled validation texts",
    ),
    "cart-adamerging": Method(
        "CART + AdaMerging",
        "dummy",
        (
            *(f"{_OWN}.TextCartAdaMerging", *_ADAPTING),
            *("+method.rank_ratio=0.08", "+method.scaling_factor=2.0"),
        ),
        {"scaling_factor": (1.0, 2.0, 3.0), "lr": (0.003, 0.01)},
        data="unlabelled validation texts",
    ),
}


def texts(task: str, split: str, count: int) -> list[str]:
    """The first texts of a split, without labels: what AdaMerging adapts to."""
    from benchmarks.text.tasks import load_split

    return list(load_split(task, split).head(count).texts)


def pool(models: Mapping[str, Path], base: Path) -> dict[str, Any]:
    """FusionBench's config of the model pool, the heads' folders beside the models.

    Args:
        models: fine-tuned encoders by task.
        base: what they were fine-tuned from.
    """
    loader = {
        "_target_": "transformers.BertModel.from_pretrained",
        # It takes no part in a text's feature, and fine-tuning has left it where it was.
        "add_pooling_layer": False,
    }
    folders = {"_pretrained_": base, **models}
    data = {"_target_": f"{__name__}.texts", "split": "validation", "count": ADAPTING_TEXTS}
    return {
        "_target_": "fusion_bench.modelpool.SequenceClassificationModelPool",
        "_recursive_": False,
        "models": {
            name: loader | {"pretrained_model_name_or_path": str(folder)}
            for name, folder in folders.items()
        },
        "tokenizer": {
            "_target_": "transformers.AutoTokenizer.from_pretrained",
            "pretrained_model_name_or_path": str(base),
        },
        "test_datasets": {task: data | {"task": task} for task in models},
        "heads": {task: str(task_head_folder(task, FineTuning())) for task in models},
    }


def merged(key: str, point: Point, config: Mapping[str, Any], folder: Path) -> Path:
    """The folder of a merge by one of `METHODS`, made now if it is not there.

    Args:
        key: of the method.
        point: its settings.
        config: of the pool, as `pool` gives it.
        folder: where merges are kept.

    Raises:
        click.ClickException: FusionBench failed; with its last words.
    """
    overrides = METHODS[key].overrides(point)
    ours = revisions(OURS) if key.startswith("cart") else {}
    identity = {
        "overrides": overrides,
        "pool": dict(config),
        "fusion-bench": installed("fusion-bench"),
        **ours,
    }
    place = folder / f"{key}-{settings_hash(identity)}"
    if read_manifest(place) is not None:
        return place
    base = Path(config["models"]["_pretrained_"]["pretrained_model_name_or_path"])
    with new_folder(place) as target:
        work = target / "work"
        conf = work / "conf" / "modelpool" / "text.yaml"
        conf.parent.mkdir(parents=True)
        conf.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        program = Path(sys.executable).with_name("fusion_bench")
        command: list[str | Path] = [program, "--config-dir", work / "conf", *overrides]
        command += ["modelpool=text", "taskpool=dummy", "fabric.accelerator=cpu", "seed=0"]
        command += ["fabric.loggers=null", "report_save_path=null", "print_config=false"]
        command += [f"merged_model_save_path={target}"]
        try:
            measure(command, work / "log.txt", _environment(), folder=work)
        except CommandError as error:
            raise click.ClickException(f"{METHODS[key].title}: {error}") from error
        if not (target / WEIGHTS).is_file():
            raise click.ClickException(f"{METHODS[key].title} has saved no {WEIGHTS}")
        shutil.rmtree(work)
        for path in base.iterdir():  # tokenizer
            if path.is_file() and not (target / path.name).exists() and path.name != MANIFEST:
                shutil.copy(path, target / path.name)
        write_json(target / MANIFEST, identity)
    return place


def _environment() -> dict[str, str]:
    """This process's, with this repository where Python looks for the classes that we name."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def tune(
    keys: Sequence[str], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Point], list[dict[str, Any]]]:
    """Merge and judge all settings of methods on the validation texts.

    What is judged is found again; its weights are not kept.

    Args:
        keys: of methods.
        config: of the pool, with the first seed's models.
        folder: where merges are kept.

    Returns:
        The best settings by method, and a row for each of all settings.
    """
    record = Record(
        folder / "validation.json",
        {
            "pool": dict(config),
            "fusion-bench": installed("fusion-bench"),
            "revisions": revisions(OURS),
        },
        spared={"revisions": lambda key: not key.startswith("cart")},
    )
    chosen: dict[str, Point] = {}
    rows = []
    for key in keys:
        for points in _lines(METHODS[key]):
            if any(_name(key, point) not in record.cases for point in points):
                for point, place in _along(key, points, config, folder):
                    found = validation(str(place))
                    tasks = config["test_datasets"]
                    record.put(_name(key, point), {task: found[task] for task in tasks})
        best = -1.0
        for point in METHODS[key].points():
            name = _name(key, point)
            accuracy = record.cases[name]
            mean = statistics.fmean(accuracy.values())
            click.echo(f"validation: {100 * mean:.1f} {name}")
            rows.append({"name": name, "method": key, "settings": point, "accuracy": accuracy})
            if mean > best:
                best, chosen[key] = mean, point
    return chosen, rows


def _name(key: str, point: Point) -> str:
    return f"{key} {json.dumps(point)}"


def _lines(method: Method) -> Iterator[list[Point]]:
    """The settings of a method, those that differ in its scale together."""
    for point, scales in method.groups():
        yield [point | {str(method.scale): scale} for scale in scales] or [point]


def _along(
    key: str, points: Sequence[Point], config: Mapping[str, Any], folder: Path
) -> Iterator[tuple[Point, Path]]:
    """Merges at settings that differ in the scale alone, each until the next is asked for.

    The first and the last are FusionBench's; the others lie on the line through both.
    """
    ends = points if len(points) == 1 else [points[0], points[-1]]
    places = [merged(key, point, config, folder) for point in ends]
    if len(points) > 2:
        scale = str(METHODS[key].scale)
        low, high = (load_file(place / WEIGHTS) for place in places)
        first, last = (point[scale] for point in ends)
        for point in points[1:-1]:
            place = folder / "between"
            shutil.copytree(places[0], place, dirs_exist_ok=True)
            state = between(low, high, (point[scale] - first) / (last - first))
            save_file(state, place / WEIGHTS, {"format": "pt"})
            yield point, place
            shutil.rmtree(place)
    for point, place in zip(ends, places, strict=True):
        yield point, place
        shutil.rmtree(place)
