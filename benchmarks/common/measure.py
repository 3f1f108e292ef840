"""Running a command and measuring it, and the models that merging is measured on.

Run as a script, this file is the small process that `measure` puts between itself and the command:
`python -S benchmarks/common/measure.py LOG LIMIT MEMORY COMMAND...` prints what COMMAND needed, as
one line of JSON; LIMIT is in seconds, MEMORY in bytes, both empty for none.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
_BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
_TOO_LONG = 124  # this script's exit code then, as `timeout` has it


class CommandError(RuntimeError):
    """A measured command failed; the message ends with the last lines that it printed."""


class TooLongError(CommandError):
    """A measured command was ended because it took longer than it may."""


@dataclass(frozen=True)
class Measurement:
    """What one run of a command needed.

    Attributes:
        wall: seconds from start to exit.
        cpu: user and system seconds of all its threads.
        peak: largest resident set, in bytes.
    """

    wall: float
    cpu: float
    peak: int


def run(
    command: Sequence[str], log: str, environment: Mapping[str, str], limit: float | None = None
) -> Measurement:
    """Run a command from this process and measure it.

    Linux counts the parent's memory at the start into the child's peak, so `peak` is at least this
    process's own size: use `measure` where that matters.

    Args:
        command: program and arguments.
        log: file that gets what the command prints.
        environment: all environment variables of the command.
        limit: seconds after which the command is ended; only in a process's main thread.

    Raises:
        TooLongError: the limit is reached.
        CommandError: the command's exit code is not 0.
    """
    output = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    started = time.perf_counter()
    process = os.posix_spawnp(command[0], list(command), environment, file_actions=output)
    late = False

    def end(*_: Any) -> None:
        nonlocal late
        late = True
        os.kill(process, signal.SIGKILL)  # not reaped yet: the process is still ours

    if limit is not None:
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, limit)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if limit is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - started
    if late:
        raise TooLongError(f"{' '.join(command)} took more than {limit:g} s")
    if code := os.waitstatus_to_exitcode(status):
        with open(log, errors="replace") as file:
            tail = "".join(file.readlines()[-20:])
        raise CommandError(f"{' '.join(command)} exited with {code}:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measurement(wall, cpu, usage.ru_maxrss * _BYTES_PER_UNIT)


def measure(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
    limit: float | None = None,
    memory: int | None = None,
) -> Measurement:
    """Run a command and measure it, whatever the size of this process.

    Args:
        command: program and arguments.
        log: file that gets what the command prints.
        environment: all environment variables of the command; by default this process's.
        folder: where the command runs; by default this process's.
        limit: seconds after which the command is ended.
        memory: bytes that it may have; asking for more fails then, where the system (Linux) counts.
            Without, the system ends whichever process it likes when there is none left.

    Raises:
        TooLongError: the limit is reached.
        CommandError: the command's exit code is not 0.
    """
    limits = ["" if given is None else str(given) for given in (limit, memory)]
    done = subprocess.run(
        [sys.executable, "-S", __file__, str(log.resolve()), *limits, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    if done.returncode:
        told = done.stderr.strip()
        if done.returncode == _TOO_LONG:
            raise TooLongError(told)
        # Empty if a signal ended the process in between: the exit code is its number, negative.
        raise CommandError(told or f"{command[0]} was not measured: exit code {done.returncode}")
    return Measurement(**json.loads(done.stdout))


def machine() -> dict[str, Any]:
    """What a reader needs to place figures: the machine, and how busy others keep it just now."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-shaped model; the default has 103 M parameters."""

    hidden: int = 768
    intermediate: int = 2048
    layers: int = 11
    heads: int = 12
    vocabulary: int = 32000
    shared: int = 1  # heads to each pair of keys and values


def write_llama_models(
    folder: Path,
    tuned: int,
    seed: int = 0,
    *,
    shape: LlamaShape | None = None,
    directions: int | None = 64,
    decay: float = 0.7,
    noise: float = 0.1,
) -> list[Path]:
    """Write a Llama-shaped model in bf16 and fine-tuned copies of it.

    A copy differs from the base by what fine-tuning leaves: in each matrix a difference of 3 % of
    its norm, most of it in a decaying spectrum.

    Args:
        folder: where to write.
        tuned: number of copies.
        seed: of the weights.
        shape: sizes of the model.
        directions: length of the decaying spectrum; all directions of each matrix if None.
        decay: singular values fall like ``i ** -decay``, roughly.
        noise: share of the difference's energy that has a flat spectrum.

    Returns:
        The folders: the base first, then the `tuned` copies.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape or LlamaShape()
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // shape.shared,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    folders = [folder / "base", *(folder / f"tuned-{index}" for index in range(tuned))]
    for index, path in enumerate(folders):
        generator = torch.Generator().manual_seed(seed + index)
        for name, value in model.state_dict().items():
            value.copy_(base[name])
            if index and value.ndim == 2:
                rows, columns = value.shape
                length = directions or min(rows, columns)
                left = torch.randn(rows, length, generator=generator)
                left *= torch.arange(1, length + 1) ** -decay
                low = left @ torch.randn(length, columns, generator=generator)
                flat = torch.randn(rows, columns, generator=generator)
                for part, share in ((low, 1 - noise), (flat, noise)):
                    value += part * (0.03 * share**0.5 * base[name].norm() / part.norm())
        model.to(torch.bfloat16).save_pretrained(path)
        model.to(torch.float32)
    return folders


if __name__ == "__main__":
    log, seconds, memory, *command = sys.argv[1:]
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    try:
        limit = float(seconds) if seconds else None
        print(json.dumps(asdict(run(command, log, os.environ, limit))))
    except TooLongError as error:
        print(error, file=sys.stderr)
        sys.exit(_TOO_LONG)
    except (CommandError, OSError) as error:
        sys.exit(str(error))
