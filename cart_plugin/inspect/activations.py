"""What models see: the inputs of their linear layers on texts or images of a user."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.reading import Checkpoint, open_folder
from cart_plugin.checkpoints.writing import TensorFile
from cart_plugin.errors import CartError, first_line

_EXAMPLES = 64  # of texts or images
_TOKENS = 256  # of a text
_VECTORS = 256  # of a layer, over all examples
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Examples:
    """Texts or images.

    Attributes:
        path: where they are from.
        texts: the lines of a file; empty for images.
        images: files of a folder; empty for texts.
    """

    path: Path
    texts: Sequence[str]
    images: Sequence[Path]

    @classmethod
    def read(cls, path: Path) -> Examples:
        """A text file, an example a line, or a folder of images (folders in it, too).

        Of many, 64 that lie evenly over all.

        Raises:
            CartError: it is neither, or has none.
        """
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
            if not found:
                raise CartError(
                    f"--inputs {path} is a folder without images ({', '.join(_IMAGES)})"
                )
            return cls(path, [], _some(found))
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise CartError(
                f"--inputs {path} cannot be read: {first_line(error)}; name a text file with an "
                "example a line, or a folder of images"
            ) from None
        if not lines:
            raise CartError(f"--inputs {path} is empty: write an example a line")
        return cls(path, _some(lines), [])

    def digest(self) -> str:
        """Of what they say."""
        found = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            found.update(text.encode() + b"\n")
        for image in self.images:
            found.update(image.read_bytes())
        return found.hexdigest()


def _some(values: Sequence[Any]) -> list[Any]:
    count = min(len(values), _EXAMPLES)
    return [values[index * len(values) // count] for index in range(count)]


@dataclass(frozen=True)
class Subject:
    """A model that can be run.

    Attributes:
        name: what errors call it.
        model: its folder, or that of its base.
        adapter: of the adapter, if it has one.
        side: folders that may have its tokenizer or image processor, the first that has one counts.
    """

    name: str
    model: Path
    adapter: Path | None
    side: Sequence[Path]


def collect(
    subject: Subject, examples: Examples, file: Path, tell: Callable[[int, int], None]
) -> None:
    """Run a model and keep some of what its linear layers get, as a safetensors file.

    Args:
        subject: the model.
        examples: what to run it on.
        file: to write: for each weight, by its name in the model's file, ``(N, n)`` in fp32.
        tell: is told how many examples are done, and their number.

    Raises:
        CartError: it cannot be loaded or run.
    """
    model, weights = _load(subject)
    feed = _feeder(subject, examples)
    count = len(examples.texts or examples.images)
    each = math.ceil(_VECTORS / count)
    kept: dict[str, list[Tensor]] = {name: [] for name in weights.values()}
    generator = torch.Generator().manual_seed(0)

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            chosen = torch.randperm(len(rows), generator=generator)[:each]
            kept[name].append(rows[chosen].float())

        return keep

    handles = [
        module.register_forward_pre_hook(keeper(weights[name]))
        for name, module in model.named_modules()
        if name in weights
    ]
    try:
        with torch.inference_mode():
            for number, arguments in enumerate(feed):
                model(**arguments)
                tell(number + 1, count)
    except Exception as error:  # whatever a foreign model makes of the examples
        raise CartError(
            f"{subject.name} cannot be run on {examples.path}: {first_line(error)}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    held = {name: torch.cat(parts)[:_VECTORS] for name, parts in kept.items() if parts}
    if not held:
        raise CartError(f"{subject.name} has no linear layer that {examples.path} reaches")
    for name, tensor in held.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CartError(
                f"{subject.name}: the inputs of {name} are not finite on {examples.path}"
            )
    scratch = file.with_suffix(".new")
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
    with TensorFile(scratch, layout) as opened:
        for name, tensor in held.items():
            opened.write(name, tensor)
    scratch.replace(file)


def opened(file: Path, name: str) -> Checkpoint:
    """Activations that `collect` has written."""
    return Checkpoint(name, file, {}, read_header(file, f"the inputs of {name}"), [file])


def _load(subject: Subject) -> tuple[Any, Mapping[str, str]]:
    """The model, and for each linear layer the name of its weight in the file."""
    checkpoint = open_folder(subject.model, subject.name)
    kind = names.model_class(checkpoint.config, subject.name)
    try:
        model = kind.from_pretrained(subject.model, dtype="auto", local_files_only=True)
        if subject.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(subject.adapter)).merge_and_unload()
    except Exception as error:
        raise CartError(f"{subject.name} cannot be loaded: {first_line(error)}") from None
    model.eval()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if subject.adapter is not None:  # its weights have the names of the model's modules
        return model, {name: f"{name}.weight" for name in linear}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    sources = {
        unit.targets[0]: unit.sources[0]
        for unit in names.one_way(model, shapes)
        if len(unit.targets) == len(unit.sources) == 1 and not unit.is_converted
    }
    weights = {name: sources.get(f"{name}.weight") for name in linear}
    return model, {name: source for name, source in weights.items() if source is not None}


def _feeder(subject: Subject, examples: Examples) -> Iterator[Mapping[str, Any]]:
    """Arguments of the model's forward, an example at a time: no padding."""
    from transformers import AutoImageProcessor, AutoTokenizer

    maker: Any = AutoTokenizer if examples.texts else AutoImageProcessor
    what = "tokenizer" if examples.texts else "image processor"
    processor = None
    reason = ""
    for folder in subject.side:
        try:
            processor = maker.from_pretrained(folder, local_files_only=True)
            break
        except Exception as error:  # it has none: the next one may
            reason = reason or first_line(error)
    if processor is None:
        raise CartError(f"{subject.name} has no {what} that transformers can load: {reason}")
    if examples.texts:
        return (
            dict(processor(text, return_tensors="pt", truncation=True, max_length=_TOKENS))
            for text in examples.texts
        )
    return _pictures(processor, examples.images)


def _pictures(processor: Any, images: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    try:
        from PIL import Image
    except ImportError:
        raise CartError("images need Pillow: pip install pillow") from None

    for path in images:
        with Image.open(path) as image:
            yield dict(processor(image.convert("RGB"), return_tensors="pt"))
