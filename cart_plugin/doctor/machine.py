"""The machine a merge runs on: its devices, memory and linear algebra threads."""

from __future__ import annotations

import os
import re
from typing import Any

from cart_plugin.doctor.findings import Finding, ok, warning


def check_devices(torch: Any) -> list[Finding]:
    """List what tensors can be computed on, with the memory of each."""
    memory = available_memory()
    free = "" if memory is None else f", {size(memory)} of memory available"
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [ok(f"CPU: {cores()} usable cores, {capability}{free}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            findings.append(
                ok(f"cuda:{index}: {device.name}, {size(device.total_memory)} (mergekit: --cuda)")
            )
    elif torch.backends.mps.is_available():
        limit = size(torch.mps.recommended_max_memory())
        findings.append(
            ok(
                f"mps: Apple GPU, up to {limit} (mergekit: --device mps); it has no fp64, so that "
                "tensors are decomposed on the CPU"
            )
        )
    else:
        findings.append(ok("GPU: none that torch can use; merging works on the CPU"))
    return findings


def check_threads(torch: Any) -> list[Finding]:
    """Tell the linear algebra library and its threads, which decide how long the SVDs take."""
    threads, usable = torch.get_num_threads(), cores()
    fact = f"torch uses {threads} CPU threads"
    libraries = _blas_libraries(torch)
    fact += f"; {libraries}" if libraries else ""
    if threads > usable:
        return [
            warning(
                f"{fact}, more than the {usable} usable cores: they will wait for each other",
                f"pass -j {usable} to mergekit, or set OMP_NUM_THREADS={usable}",
            )
        ]
    if threads == 1 < usable:
        return [
            warning(
                f"{fact} of {usable} usable cores",
                f"pass -j {usable} to mergekit, or unset OMP_NUM_THREADS",
            )
        ]
    return [ok(fact)]


def _blas_libraries(torch: Any) -> str:
    """The BLAS that torch was built with, and those that the process has loaded, with threads."""
    built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    parts = [f"its BLAS is {built.group(1)}"] if built else []
    try:
        from threadpoolctl import threadpool_info  # type: ignore[import-untyped]
    except ImportError:
        return "; ".join(parts)
    loaded = {
        f"{info['internal_api']} {info['version'] or ''}: {info['num_threads']} threads"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    }
    return "; ".join([*parts, *sorted(loaded)])


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes of main memory that a new program can have, or None where that is unknown."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def size(number: float) -> str:
    """A number of bytes, readable: `512 bytes`, `1.5 GB`."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} {units[0]}" if number >= 100 else f"{number:.3g} {units[0]}"
