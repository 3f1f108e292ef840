"""Evaluators, run in a process of their own by `child`: `judge:main REQUEST RESULT`.

A request is a JSON file: an lm-eval call or a Python function, and the model's folder. The result
is one too: `{"metrics": {name: {"value", "stderr", "metric", "higher_is_better"}}}`, of a function
with the files that it has read (`reads`).
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.files import read_json, write_json
from cart_plugin.compare.reads import Reads
from cart_plugin.errors import CartError

Metrics = dict[str, dict[str, Any]]


def evaluate(request: Mapping[str, Any], model: str) -> Metrics:
    """Evaluate one model folder.

    Args:
        request: `{"kind": "lm-eval", ...}` or `{"kind": "function", "name": "package.module:f"}`.
        model: the folder.

    Raises:
        CartError: the evaluator's answer is of no use.
    """
    if request["kind"] == "lm-eval":
        return _lm_eval(request, model)
    return numbers(find_function(request["name"])(model))


def find_function(name: str) -> Any:
    """The function that `package.module:function` names; the current folder is looked at, too.

    Raises:
        CartError: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise CartError(f"evaluator {name!r} is not of the form package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CartError(f"evaluator {name} cannot be found: {error}") from error
    if not callable(function):
        raise CartError(f"evaluator {name} is not a function")
    return function


def numbers(answer: object) -> Metrics:
    """What an evaluator function returned: `{metric: number}`, with `metric_stderr` beside it.

    Raises:
        CartError: it is something else, or a number is not finite.
    """
    if not isinstance(answer, Mapping) or not answer:
        raise CartError(
            f"the evaluator returned {type(answer).__name__}, not a mapping of names to numbers"
        )
    values: dict[str, float] = {}
    for name, value in answer.items():
        try:
            values[str(name)] = float(value)
        except (TypeError, ValueError):
            raise CartError(f"the evaluator's {name} is no number: {value!r}") from None
        if not math.isfinite(values[str(name)]):
            raise CartError(f"the evaluator's {name} is {value}")
    return {
        name: {
            "value": value,
            "stderr": values.get(f"{name}_stderr"),
            "metric": "",
            "higher_is_better": True,
        }
        for name, value in values.items()
        if not (name.endswith("_stderr") and name.removesuffix("_stderr") in values)
    }


def _task_manager(request: Mapping[str, Any], model: str = "") -> Any:
    """lm-eval's tasks; some read the model's name from the metadata, as its command line gives it.

    Raises:
        CartError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CartError(
            f"lm-eval cannot be used ({error}): pip install 'cart-plugin[compare]', or name an "
            "--evaluator"
        ) from error
    metadata = {"pretrained": model, **request.get("model_args", {})} if model else None
    return TaskManager(include_path=request.get("include_path"), metadata=metadata)


def check(request: Mapping[str, Any]) -> str:
    """Find what would make every evaluation fail, before the first merge.

    Returns:
        A digest of the files that decide the evaluator's answers beside the model: the user's task
        definitions, or the function's module and what it imports from the current folder.

    Raises:
        CartError: an unknown task, or a function that cannot be imported.
    """
    if request["kind"] == "function":
        find_function(request["name"])
        here = Path.cwd()
        files = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
        own = sys.modules[request["name"].partition(":")[0]].__file__
        local = {
            path for path in files if here in path.parents and "site-packages" not in str(path)
        }
        return _digest({*local, Path(own or "")})
    manager = _task_manager(request)
    unknown = [name for name in request["tasks"] if not manager.match_tasks([name])]
    if unknown:
        raise CartError(
            f"lm-eval does not know {', '.join(unknown)}; `lm-eval ls tasks` lists its tasks, "
            "--include-path adds your own"
        )
    if request.get("include_path") is None:
        return ""
    found = Path(request["include_path"]).rglob("*")
    return _digest({path for path in found if "__pycache__" not in path.parts})


def _digest(paths: Iterable[Path]) -> str:
    contents = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        data = path.read_bytes()
        contents.update(f"{path} {len(data)}\n".encode() + data)
    return contents.hexdigest()[:16]


def _lm_eval(request: Mapping[str, Any], model: str) -> Metrics:
    import lm_eval
    import torch

    options = dict(request.get("options", {}))
    # lm-eval 0.4.13 takes "cuda" if no device is given, and fails where there is none.
    options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    arguments = {"pretrained": model, **request.get("model_args", {})}
    manager = _task_manager(request, model)
    answer = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(request["tasks"]),
        task_manager=manager,
        log_samples=False,
        **options,
    )
    if answer is None:
        raise CartError("lm-eval returned nothing")
    return figures(answer, request["tasks"], manager)


def figures(answer: Mapping[str, Any], patterns: Iterable[str], manager: Any) -> Metrics:
    """One figure for each task or group that was asked for, from lm-eval's answer.

    Raises:
        CartError: there is none for one of them.
    """
    rows = {**answer["results"], **answer.get("groups", {})}
    directions = answer.get("higher_is_better", {})
    members = answer.get("group_subtasks", {})
    found: dict[str, dict[str, Any]] = {}
    waiting = [name for pattern in patterns for name in manager.match_tasks([pattern])]
    while waiting:
        name = waiting.pop(0)
        entry = _main_metric(name, rows.get(name, {}), directions.get(name, {}))
        if entry is not None:
            found[name] = entry
            continue
        # A tag has no row of its own, a group without aggregation one without numbers.
        index = manager.task_index.get(name)
        is_tag = index is not None and index.kind.name == "TAG"
        inside = members.get(name) or (sorted(index.tags) if is_tag else [])
        if not inside:
            raise CartError(f"lm-eval gives no number for {name}")
        waiting = [*inside, *waiting]
    return found


def _main_metric(
    task: str, row: Mapping[str, Any], directions: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A task's first metric in lm-eval's order (accuracy before its normalised form), if any."""
    for key, value in row.items():
        metric, _, chosen_filter = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if metric in ("alias", "sample_len", "sample_count"):
            continue
        if not math.isfinite(value):
            raise CartError(f"lm-eval's {key} of {task} is {value}")
        stderr = row.get(f"{metric}_stderr,{chosen_filter}")
        return {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "metric": key,
            "higher_is_better": directions.get(metric) is not False,
            "all": {name: entry for name, entry in row.items() if isinstance(entry, int | float)},
        }
    return None


def main() -> None:
    """Answer the request file of the command line by a result file, which holds any error."""
    request, result = sys.argv[1:3]
    asked = read_json(Path(request))
    answer: dict[str, Any]
    try:
        if asked["model"] is None:
            answer = {"sources": check(asked)}
        else:
            reads = Reads()
            answer = {"metrics": evaluate(asked, asked["model"])}
            if asked["kind"] == "function":
                answer["read"] = reads.files(asked["model"], str(Path(result).parents[1]))
    except CartError as error:
        answer = {"error": str(error)}
    except Exception as error:  # whatever an evaluator raises is a row of the report
        import traceback

        traceback.print_exc()
        message = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {message[0] if message else ''}".rstrip(": ")}
    write_json(Path(result), answer)
