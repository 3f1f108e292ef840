"""Whatever is broken: a finding or one clear line, in time and memory, and nothing half done."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

from cart_plugin.cli import main
from tests.doctor.tiny import load_tensors, save_model
from tests.execution import mutations
from tests.execution.test_command import lora

pytestmark = pytest.mark.usefixtures("in_this_process")

SECONDS = 30
KILOBYTES = 1_000_000
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 12}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one file, of shards, with an adapter, and some that mergekit cannot plan."""
    place = tmp_path_factory.mktemp("healthy")
    for seed in range(3):
        save_model(place / f"one-{seed}", "llama", seed, **SMALL)
        model = transformers.AutoModelForCausalLM.from_pretrained(place / f"one-{seed}")
        model.save_pretrained(place / f"shards-{seed}", max_shard_size="5KB")
        save_model(place / f"bare-{seed}", "bert", seed, **SMALL)
    lora(str(place / "one-0"), place / "lora", 0)
    return place


def broken(seed: int, healthy: Path, place: Path) -> Path:
    """A recipe of which something is broken."""
    draw = random.Random(seed)
    shutil.copytree(healthy, place)
    family = draw.choice(["one", "one", "shards", "bare", "lora"])
    folders = [str(place / f"{'one' if family == 'lora' else family}-{n}") for n in range(3)]
    models = [*folders]
    if family == "lora":
        models[0] += f"+{place / 'lora'}"
    recipe = place / "recipe.yaml"
    document = {
        "merge_method": draw.choice(["cart", "linear", "ties", "cart_auto", "slerp"]),
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        "parameters": {"t": 0.5} if draw.randrange(2) else {},
        "dtype": draw.choice([None, "float32", "bfloat16"]),
    }
    if draw.randrange(2):
        document["base_model"] = folders[0]
    recipe.write_text(yaml.safe_dump(document))
    if draw.randrange(3) == 0:
        mutations.recipe(recipe, draw)
        return recipe
    folder = place / "lora" if family == "lora" else Path(draw.choice(folders))
    known = [file for file in sorted(folder.iterdir()) if file.name in mutations.BREAKS]
    known += sorted(folder.glob("model-*.safetensors"))
    file = draw.choice(known)
    if draw.randrange(8) == 0:
        mutations.gone(file, draw)
    else:
        mutations.BREAKS.get(file.name, mutations.weights)(file, draw)
    return recipe


class Hang(BaseException):
    """No OSError, as TimeoutError is: nothing may take it for its own."""


def stop(_: int, frame: FrameType | None) -> None:
    raise Hang("it hangs:\n" + "".join(traceback.format_stack(frame)[-6:]))


def attempt(seed: int, healthy: Path, tmp_path: Path) -> str:
    """Merge what a seed breaks; how it ended, if that is not as it should be."""
    place, out = tmp_path / "broken", tmp_path / "out"
    recipe = broken(seed, healthy, place)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    force = ["--force"] if seed % 2 else []
    try:
        done = CliRunner().invoke(main, ["merge", str(recipe), str(out), *force])
    except Hang as hang:
        return str(hang)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    try:
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            where = "".join(traceback.format_exception(done.exception)[-4:])
            return f"{type(done.exception).__name__}: {where}"
        if "Traceback" in done.output:
            return f"a traceback:\n{done.output[-2000:]}"
        if "the check failed" in done.output or "the check itself failed" in done.output:
            line = next(line for line in done.output.splitlines() if "failed: " in line)
            return f"a finding that is none: {line}"
        if [path for path in tmp_path.iterdir() if path.name not in ("broken", "out")]:
            return "something is left beside OUT"
        if done.exit_code == 0:
            return looks_wrong(out)
        last = done.output.strip().splitlines()[-1]
        if done.exit_code != 1 or not last.startswith("Error: ") or out.exists():
            return f"exit code {done.exit_code}, OUT {out.exists()}: {last}"
        return ""
    finally:
        shutil.rmtree(place)
        shutil.rmtree(out, ignore_errors=True)


def looks_wrong(out: Path) -> str:
    """Why a finished merge is none."""
    tensors = load_tensors(out)
    if len(tensors) < 5:
        return f"only {len(tensors)} tensors"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return "not finite"
    config = transformers.AutoConfig.from_pretrained(out)
    kind = getattr(transformers, config.architectures[0])
    _, info = kind.from_pretrained(out, output_loading_info=True)
    return f"lacks {sorted(info['missing_keys'])[:3]}" if info["missing_keys"] else ""


def run(seeds: range, healthy: Path, tmp_path: Path) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {seed: attempt(seed, healthy, tmp_path) for seed in seeds}
    wrong = {seed: text for seed, text in found.items() if text}
    assert not wrong, "\n\n".join(f"seed {seed}: {text}" for seed, text in wrong.items())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < KILOBYTES * (1024 if sys.platform == "darwin" else 1)


@pytest.mark.parametrize("part", range(4))
def test_broken_input_ends_in_one_line(part: int, healthy: Path, tmp_path: Path) -> None:
    run(range(50 * part, 50 * (part + 1)), healthy, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(40))
def test_much_broken_input_ends_in_one_line(part: int, healthy: Path, tmp_path: Path) -> None:
    run(range(200 + 50 * part, 200 + 50 * (part + 1)), healthy, tmp_path)


def test_healthy_input_is_merged(healthy: Path, tmp_path: Path, merge: Callable) -> None:
    """The mutations start from what works."""
    recipe = tmp_path / "r.yaml"
    for family in ("one", "shards", "bare"):
        models = [{"model": str(healthy / f"{family}-{n}")} for n in range(3)]
        recipe.write_text(yaml.safe_dump({"merge_method": "cart", "models": models}))
        done = merge(recipe, tmp_path / family)
        assert done.exit_code == 0, done.output
        assert looks_wrong(tmp_path / family) == ""
