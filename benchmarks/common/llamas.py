"""Llama-shaped models in the benchmarks' cache."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.common.measure import LlamaShape, measure


def llama_models(
    name: str, tuned: int, console: Console, shape: LlamaShape | None = None
) -> list[Path]:
    """Folders of a base and of its fine-tuned copies, from the cache or made now.

    Another process makes them: torch would count into the memory of what this one measures.

    Args:
        name: of their folder.
        tuned: number of copies.
        console: is told when they are made.
        shape: sizes of the model; those of `LlamaShape` if None.
    """
    folder = cache_root() / name
    if read_manifest(folder) is None:
        console.print("making the models")
        with new_folder(folder) as temporary:
            program = (
                "import sys; from pathlib import Path; from benchmarks.common.measure import *; "
                f"write_llama_models(Path(sys.argv[1]), {tuned}, shape={shape})"
            )
            measure([sys.executable, "-c", program, temporary], temporary / "log.txt")
            write_json(temporary / MANIFEST, {"tuned": tuned})
    return [folder / "base", *(folder / f"tuned-{index}" for index in range(tuned))]
