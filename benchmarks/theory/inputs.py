"""What the layers of the suites' models get on examples of their own tasks' validation splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.suites import Encoders
from cart_plugin.inspect.activations import Activations, Examples, Subject, collect

EXAMPLES = 64  # a task


def of_encoder(suite: str, held: Encoders, task: str, folder: Path) -> Activations:
    """Run a task's encoder.

    Args:
        suite: `vision` or `text`.
        held: the encoders.
        task: by name.
        folder: for files that live as long as what is returned.
    """
    examples = folder / suite / task
    if suite == "vision":
        write_images(task, examples)
    else:
        examples = write_lines(texts(task), examples.with_suffix(".txt"))
    side = [held.folders[task], held.pretrained]
    subject = Subject(task, held.folders[task], None, False, side)
    file = folder / f"{held.folders[task].name}.safetensors"
    return collect(subject, Examples.read(examples), file, lambda *_: None)


def texts(task: str) -> Sequence[str]:
    """Those of a task of the text suite."""
    from benchmarks.text.tasks import load_split

    return list(load_split(task, "validation").head(EXAMPLES).texts)


def write_images(task: str, folder: Path) -> None:
    """Write those of a task of the image suite into a folder, unless they are there."""
    from PIL import Image

    from benchmarks.vision.tasks import load_split

    if folder.exists():
        return
    folder.mkdir(parents=True)
    for number, image in enumerate(load_split(task, "validation").head(EXAMPLES).images):
        Image.fromarray(image).convert("RGB").save(folder / f"{number:03}.png")


def write_lines(examples: Sequence[str], file: Path) -> Path:
    """Write texts, one a line: their own line breaks become spaces."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(" ".join(text.split()) + "\n" for text in examples))
    return file
