"""One architecture in one format: its models on the disk, and what each command makes of them."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors import safe_open

from benchmarks.architectures import models, vision_language
from benchmarks.architectures.models import Architecture
from cart_plugin.execution import child

ARCHITECTURES: dict[str, Architecture] = {**models.MODELS, **vision_language.MODELS}
FORMATS = {"published": True, "the model's": False}  # save_original_format
SECONDS = 120  # a command that takes longer hangs
_TOLERANCE = 1e-5  # of a mean in fp32, relative to the tensor


def save_models(folder: Path, architecture: Architecture, original: bool) -> list[Path]:
    """Three models that differ in each value, and their processor."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = architecture.build()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases start equal in all models: a merge of them would show nothing.
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        folders.append(folder / f"model-{seed}")
        model.save_pretrained(folders[-1], save_original_format=original)
        if architecture.processor is not None:
            architecture.processor(folders[-1])
    return folders


def tensor_names(folder: Path) -> set[str]:
    """What the weight files of a folder hold."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def run_case(name: str, form: str, place: Path) -> dict[str, Any] | None:
    """What the commands make of an architecture; None if its formats do not differ.

    Args:
        name: in the table.
        form: how its models are saved, one of `FORMATS`.
        place: an empty folder.
    """
    architecture = ARCHITECTURES[name]
    folders = save_models(place, architecture, FORMATS[form])
    if form != next(iter(FORMATS)):
        other = save_models(place / "other", architecture, True)
        if tensor_names(folders[0]) == tensor_names(other[0]):
            return None
    recipe = place / "recipe.yaml"
    entries = [{"model": str(model), "parameters": {"weight": 1.0}} for model in folders]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
    cls = getattr(transformers, architecture.model)
    expected = _mean([_state(cls, folder) for folder in folders])
    processed = _processor(folders[0])

    def judged(command: str, *arguments: str) -> dict[str, Any]:
        out = place / command
        started = time.monotonic()
        code, text = forked(command, [*arguments, str(recipe), str(out)])
        found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "code": code}
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if code == 0:
            wrong, total = _compare(cls, out, expected)
            found |= {"wrong": wrong, "tensors": total}
            if processed is not None:
                found["processor"] = _same_processor(folders[0], out, processed)
        found["said"] = lines[-1] if lines else ""
        return found

    code, text = forked("doctor", ["doctor", str(recipe)])
    problems = [
        line.strip().removeprefix("problem").strip()
        for line in text.splitlines()
        if line.startswith("  problem")
    ]
    return {
        "tensors": len(expected),
        "mergekit-yaml": judged("mergekit-yaml"),
        "doctor": {"code": code, "problems": problems},
        "merge": judged("merge", "merge"),
    }


def _state(cls: Any, folder: Path) -> dict[str, torch.Tensor]:
    # A missing tensor is drawn at random: the seed makes sure that it is another one each time.
    torch.manual_seed(hash(str(folder)) % 2**31)
    with _silent():
        return dict(cls.from_pretrained(folder, dtype="auto").state_dict())


def _mean(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0)
        if tensor.is_floating_point()
        else torch.stack([state[name] for state in states]).amax(
            0
        )  # counters: the longest training
        for name, tensor in states[0].items()
    }


def _compare(cls: Any, out: Path, expected: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many tensors of the loaded merge are not the mean of the inputs', and of how many."""
    try:
        state = _state(cls, out)
    except Exception:
        return len(expected), len(expected)
    wrong = 0
    for name, tensor in expected.items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape:
            wrong += 1
        elif not tensor.is_floating_point():
            wrong += not torch.equal(found, tensor)
        else:
            error = float((found.double() - tensor).norm())
            wrong += not error <= _TOLERANCE * (float(tensor.norm()) + 1e-12)
    return wrong, len(expected)


def _processor(folder: Path) -> str | None:
    """What AutoProcessor makes of a folder: a class, or "" if it needs what is not installed."""
    if not (folder / "processor_config.json").exists():
        return None
    try:
        with _silent():
            found = type(transformers.AutoProcessor.from_pretrained(folder)).__name__
            return found if found.endswith("Processor") else ""  # else it is the tokenizer alone
    except (ImportError, AttributeError, ValueError):
        return ""


def _same_processor(source: Path, out: Path, expected: str) -> bool:
    """Whether a merge has its input's processor: it loads, or has the same files if none can."""
    if expected:
        return _processor(out) == expected
    wanted = [
        path
        for path in source.iterdir()
        if "process" in path.name or path.name.startswith(("chat_template", "tokenizer"))
    ]
    return all(
        (out / path.name).exists() and (out / path.name).read_bytes() == path.read_bytes()
        for path in wanted
    )


def _silent() -> Any:
    caught = warnings.catch_warnings()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return caught


def forked(command: str, arguments: Sequence[str]) -> tuple[int | str, str]:
    """Run a command in a copy of this process, which has imported all: its exit code and output.

    A process of its own would spend ten seconds on imports, hundreds of times.
    """
    return _fork(lambda: _entry(command)(), [command, *arguments])


_SCRIPTS = {"mergekit-yaml": "mergekit.scripts.run_yaml"}  # ours is what the others name


def _entry(command: str) -> Callable[[], object]:
    """What the command's launcher calls."""
    found: Callable[[], object] = import_module(_SCRIPTS.get(command, "cart_plugin.cli")).main
    return found


def _fork(work: Callable[[], object], argv: Sequence[str]) -> tuple[int | str, str]:
    sys.stdout.flush()
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.setpgid(0, 0)
                logging.disable(logging.NOTSET)
                child.run = _child  # type: ignore[assignment]
                sys.argv = list(argv)
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = _wait(pid)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _wait(pid: int) -> int | str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"hung for {SECONDS} s"


def _child(function: str, arguments: Sequence[str], log: Path, tell: object = None) -> str:  # noqa: ARG001
    """The merge's own process, as a fork too."""
    module, _, name = function.partition(":")
    code, text = _fork(getattr(sys.modules[module], name), [function, *arguments])
    log.write_text(text)
    return "" if code == 0 else child.last_line(log)


def import_all() -> None:
    """Import what the commands need, before anything is forked."""
    import mergekit.scripts.run_yaml  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    _silent()


def fresh(place: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def is_whole(found: dict[str, Any]) -> bool:
    """Whether a merge is what it should be."""
    return bool(found["code"] == 0 and not found["wrong"] and found.get("processor", True))
