"""What models see: what their weights are multiplied by on texts or images of a user."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.reading import CONFIG, Checkpoint, open_folder
from cart_plugin.checkpoints.side_files import side_files
from cart_plugin.checkpoints.writing import TensorFile
from cart_plugin.errors import CartError, first_line
from cart_plugin.inspect import watching
from cart_plugin.inspect.inputs import Inputs

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
            reason = (error.strerror or "") if isinstance(error, OSError) else first_line(error)
            raise CartError(
                f"--inputs {path} cannot be read: {reason}; name a text file with an example a "
                "line, or a folder of images"
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
        by_model: whether weights go by the model's names, as adapters call them, not the file's.
        side: folders that may have its tokenizer or image processor, the first that has one counts.
    """

    name: str
    model: Path
    adapter: Path | None
    by_model: bool
    side: Sequence[Path]

    def digest(self) -> str:
        """Of the files beside the weights that decide what it makes of inputs."""
        found = hashlib.blake2b(digest_size=16)
        for folder in dict.fromkeys([self.model, *self.side]):
            files = side_files(folder) | {CONFIG: folder / CONFIG}
            for name, file in sorted(files.items()):
                if file.is_file():
                    found.update(f"{name} {file.stat().st_size}\n".encode() + file.read_bytes())
            found.update(b"\n\n")
        return found.hexdigest()


class Activations(NamedTuple):
    """What a model's weights are multiplied by.

    Attributes:
        held: by the weights' names in the model's file, ``(N, n)`` in fp32; of a stack ``(stack, N,
            n)``, with rows of zeros where an expert got fewer.
        turned: the names of those that are stored as (inputs, outputs).
    """

    held: Checkpoint
    turned: frozenset[str]

    def of(self, name: str, shape: tuple[int, int, int]) -> Inputs | None:
        """Those of a weight, if there are any.

        Args:
            name: of the weight.
            shape: of its matrices, ``(stack, m, n)``.
        """
        if name not in self.held.tensors:
            return None
        columns = self.held.read(name).mT
        turned = name in self.turned
        if columns.shape[-2] != shape[1 if turned else 2] or (
            columns.ndim == 3 and len(columns) != shape[0]
        ):
            return None  # the model has it in another form
        return Inputs(columns, turned)


def collect(
    subject: Subject, examples: Examples, file: Path, tell: Callable[[int, int], None]
) -> Activations:
    """Run a model and keep some of what its weights are multiplied by, as a safetensors file.

    Args:
        subject: the model.
        examples: what to run it on.
        file: to write.
        tell: is told how many examples are done, and their number.

    Raises:
        CartError: it cannot be loaded or run.
    """
    model, found = _load(subject)
    feed = _feeder(subject, examples)
    count = len(examples.texts or examples.images)
    each = math.ceil(_VECTORS / count)
    kept: dict[tuple[str, int | None], list[Tensor]] = defaultdict(list)
    turned: dict[str, bool] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(parameter: str, expert: int | None, inputs: Tensor, is_turned: bool) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator)[:each]
        kept[parameter, expert].append(rows[chosen].float())
        turned[parameter] = is_turned

    with watching.watched(model, {place.parameter for place in found.values()}, keep):
        try:
            with torch.inference_mode():
                for number, arguments in enumerate(feed):
                    model(**arguments)
                    tell(number + 1, count)
        except Exception as error:  # whatever a foreign model makes of the examples
            raise CartError(
                f"{subject.name} cannot be run on {examples.path}: {first_line(error)}"
            ) from None
    rows = {where: _sample(torch.cat(parts), generator) for where, parts in kept.items()}
    parameters = dict(model.named_parameters())
    held = {}
    for name, place in found.items():
        inputs = _rows(rows, place, len(parameters[place.parameter]))
        if inputs is not None:
            held[name] = inputs
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
    header = read_header(file, f"the inputs of {subject.name}")
    # Factors are (outputs, inputs), whatever the layer that they are of.
    stored = () if subject.by_model else held
    return Activations(
        Checkpoint(subject.name, file, {}, header, [file]),
        frozenset(name for name in stored if turned[found[name].parameter]),
    )


def _sample(rows: Tensor, generator: torch.Generator) -> Tensor:
    """As many as are kept of a layer, of all examples and of all uses of one that is shared."""
    if len(rows) <= _VECTORS:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_VECTORS].sort().values]


def _rows(
    kept: Mapping[tuple[str, int | None], Tensor], place: watching.Place, stack: int
) -> Tensor | None:
    """What a weight is multiplied by: its own, an expert's, or those of all experts."""
    own = kept.get((place.parameter, place.expert))
    if own is not None or place.expert is not None:
        return own
    held = {expert: kept.get((place.parameter, expert)) for expert in range(stack)}
    known = {expert: rows for expert, rows in held.items() if rows is not None}
    if not known:
        return None
    sizes = [len(rows) for rows in known.values()]
    found = torch.zeros(stack, max(sizes), next(iter(known.values())).shape[1])
    for expert, rows in known.items():
        found[expert, : len(rows)] = rows
    return found


def _load(subject: Subject) -> tuple[Any, Mapping[str, watching.Place]]:
    """The model, and where the weights are in it."""
    checkpoint = open_folder(subject.model, subject.name)
    kind = names.model_class(checkpoint.config, subject.name)
    try:
        model, loading = kind.from_pretrained(
            subject.model, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise CartError(f"{subject.name} cannot be loaded: {first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise CartError(
            f"{subject.name} lacks {missing[0]}{more} of {kind.__name__}, which its config.json "
            "names, so that it would be run with random weights there; correct `architectures`, or "
            "save the model with that class"
        )
    try:
        if subject.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(subject.adapter)).merge_and_unload()
    except Exception as error:
        raise CartError(f"{subject.name} cannot be loaded: {first_line(error)}") from None
    model.eval()
    parameters = dict(model.named_parameters())
    if subject.by_model:
        return model, {name: watching.Place(name) for name in parameters}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = watching.places(model, shapes)
    return model, {name: place for name, place in found.items() if place.parameter in parameters}


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
        raise CartError(
            f"{subject.name} has no {what} that transformers can load; put its files into the "
            f"model's folder ({reason.rstrip(':')})"
        )
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
