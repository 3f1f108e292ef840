"""`python -m benchmarks.adapters.speed` (`make bench-adapters`): merging adapters, beside PEFT.

Eight random adapters of all matrices of Llama-3-8B by whole `mergekit-cart merge-adapters` runs,
which need no base; and of loaded modules, `merge_loaded` beside PEFT's `add_weighted_adapter` with
`svd`, the one of its ways to a bounded rank that adds up the differences. That forms and decomposes
the module's weight.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.common.cache import cache_root, new_folder, read_manifest, write_json
from benchmarks.common.commands import out_option, publish, quick_option, runs_option
from benchmarks.common.measure import measure
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES_ADAPTERS, Record, conditions
from benchmarks.common.tables import markdown_table
from cart_plugin.adapters import merge_loaded

COUNT = 8
RANKS = (16, 64)
LAYERS = 32
SHAPES = {  # (out, in) of Llama-3-8B
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
# What PEFT's way is timed on: modules alone, and those of a layer's attention together.
TIMED: dict[str, Sequence[str]] = {
    "self_attn.k_proj": ["self_attn.k_proj"],
    "self_attn.q_proj": ["self_attn.q_proj"],
    "self_attn": [name for name in SHAPES if name.startswith("self_attn")],
}
PACKAGES = ("torch", "peft", "safetensors")


def random_adapters(rank: int, layers: int) -> list[Path]:
    """Folders of adapters with entries drawn at random, in bf16; made once."""
    root = cache_root() / "adapter-speed" / f"rank{rank}-{layers}"
    for index in range(COUNT):
        if read_manifest(root / str(index)) is None:
            with new_folder(root / str(index)) as folder:
                _write_adapter(folder, rank, layers, seed=index)
    return [root / str(index) for index in range(COUNT)]


def _write_adapter(folder: Path, rank: int, layers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator)).to(torch.bfloat16)

    tensors = {}
    for layer in range(layers):
        for module, (m, n) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = drawn(rank, n)
            tensors[f"{name}.lora_B.weight"] = drawn(m, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B"}
    config["target_modules"] = sorted(name.rpartition(".")[2] for name in SHAPES)
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "manifest.json", {"seed": seed})


def whole_run(rank: int, layers: int) -> dict[str, float]:
    """One run of the command."""
    out = cache_root() / "adapter-speed" / "merged"
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [sys.executable, "-m", "cart_plugin", "merge-adapters"]
    command += [*random_adapters(rank, layers), "--out", out]
    found = measure(command, cache_root() / "adapter-speed" / "log")
    shutil.rmtree(out)
    return {"wall": found.wall, "cpu": found.cpu, "peak": found.peak / 2**20}


def in_memory(modules: Sequence[str], rank: int, runs: int) -> dict[str, float]:
    """Seconds for modules of a loaded model: ours, medians, and PEFT's `svd`, once."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    names = [module.rpartition(".")[2] for module in modules]
    sizes = [SHAPES[module] for module in modules]
    layers = [torch.nn.Linear(n, m, bias=False) for m, n in sizes]
    layer = torch.nn.ModuleDict(dict(zip(names, layers, strict=True)))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False)
    model = get_peft_model(layer, config, adapter_name="0")
    for index in range(1, COUNT):
        model.add_adapter(str(index), config)
    adapters = [str(index) for index in range(COUNT)]
    ours = [_seconds(partial(merge_loaded, model, adapters, f"ours{run}")) for run in range(runs)]
    add = partial(model.add_weighted_adapter, adapters, [1 / COUNT] * COUNT, "theirs")
    theirs = _seconds(partial(add, combination_type="svd", svd_rank=rank))
    return {"ours": statistics.median(ours), "peft": theirs}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random adapters: that nothing is kept
        work()
    return time.perf_counter() - started


@click.command()
@runs_option(3)
@quick_option
@out_option("adapters")
def main(runs: int, quick: bool, out: Path) -> None:
    """Time merges of random adapters."""
    console = Console()
    known = conditions(MERGES_ADAPTERS, PACKAGES, quick=quick, runs=runs)
    record = Record(out / "speed.json", known)
    layers = 1 if quick else LAYERS
    for rank in RANKS:
        if (key := f"whole, rank {rank}") not in record.cases:
            taken = [whole_run(rank, layers) for _ in range(runs)]
            record.put(key, {name: statistics.median(x[name] for x in taken) for name in taken[0]})
        for what in list(TIMED)[:1] if quick else TIMED:
            if (key := f"{what}, rank {rank}") not in record.cases:
                record.put(key, in_memory(TIMED[what], rank, runs))
    publish(markdown(record, runs, layers), out / "speed.md", console)
    shutil.rmtree(cache_root() / "adapter-speed", ignore_errors=True)


def markdown(record: Record, runs: int, layers: int) -> str:
    """Two tables: whole runs, and modules beside PEFT."""
    machine = record.conditions["machine"]
    whole, modules = [], []
    for key, case in record.cases.items():
        what, _, rank = key.rpartition(", rank ")
        if what == "whole":
            whole.append([rank, f"{case['wall']:.0f}", f"{case['cpu']:.0f}", f"{case['peak']:.0f}"])
        else:
            one = what in SHAPES
            size = " x ".join(map(str, SHAPES[what])) if one else "all four side by side"
            ratio = f"{case['peft'] / case['ours']:.0f}"
            row = [f"{what}, {size}", rank, f"{case['ours']:.2f}", f"{case['peft']:.1f}", ratio]
            modules.append(row)
    numbers = ["---:"] * 3
    first = markdown_table(
        ["rank", "wall s", "CPU s", "peak MB"],
        sorted(whole, key=lambda row: int(row[0])),
        ["---:", *numbers],
    )
    second = markdown_table(
        ["module", "rank", "merge_loaded s", "PEFT's svd s", "ratio"],
        sorted(modules),
        ["---", "---:", *numbers],
    )
    return (
        f"{COUNT} random adapters into one of their rank, on {machine['processor']}, "
        f"{machine['cores']} cores. Above: all matrices of {layers} layers of Llama-3-8B by "
        f"`mergekit-cart merge-adapters`, medians of {runs}, start-up included. Below: modules "
        "of a loaded model, and PEFT's `add_weighted_adapter` by `svd` on the same model, once. "
        f"{made_by('bench-adapters', record.measured)}\n\n{first}\n\n{second}\n"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters.speed")
