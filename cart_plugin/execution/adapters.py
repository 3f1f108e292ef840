"""Inputs that are a base and an adapter, made whole models before the merge.

mergekit keeps them under the names of their paths, and takes an adapter trained anew for the old
one. Here a folder is named by what is in it.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.checkpoints import side_files
from cart_plugin.checkpoints.adapters import PICKLED, weights_file
from cart_plugin.checkpoints.agreement import headers, left_quantisation
from cart_plugin.checkpoints.files import check_space, unfinished
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.names import model_class
from cart_plugin.checkpoints.reading import Checkpoint, open_adapter
from cart_plugin.doctor.costs import fused_bytes
from cart_plugin.doctor.layout import references
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution import child
from cart_plugin.execution.inputs import Inputs, plain

_REVISION = 2  # raised when whole models of the same files come to be others


def fuse(
    inputs: Inputs,
    options: MergeOptions,
    scratch: Path,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make whole models of a recipe's inputs with adapters, unless they are in the cache.

    Args:
        inputs: the recipe and its models; left unchanged.
        options: mergekit's, of which `lora_merge_cache` keeps the models for other merges, and
            `lora_merge_dtype` is their dtype.
        scratch: takes logs, and the models where no cache is named.
        tell: receives the work's last line.

    Returns:
        The recipe, as plain data, with the whole models' folders in their place.

    Raises:
        CartError: an adapter does not fit its base, or is another one's copy; or there is no room.
    """
    config = inputs.config
    cache = Path(options.lora_merge_cache) if options.lora_merge_cache else scratch / "fused"
    made = _folders(config, options, cache.absolute())
    named = references(config)
    missing = {label: folder for label, folder in made.items() if not folder.is_dir()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        check_space(cache, sum(_bytes(inputs.checkpoints[label], options) for label in missing))
    for label, folder in missing.items():
        model = named[label]
        assert model.lora is not None
        log = scratch / f"{folder.name}.log"
        with unfinished(folder) as place:
            dtype = options.lora_merge_dtype or ""
            arguments = [model.model.path, model.lora.path, str(place), dtype]
            error = child.run("cart_plugin.execution.adapters:main", arguments, log, tell)
            if error:
                raise CartError(f"model {label}: the adapter cannot be fused: {error}")

    def whole(model: ModelReference) -> ModelReference:
        folder = made.get(str(model))
        if folder is None:
            return model
        return ModelReference.model_validate({"model": {"path": str(folder)}})

    return plain(config, whole)


def _bytes(base: Checkpoint, options: MergeOptions) -> int:
    """Of a whole model on this base.

    Raises:
        CartError: mergekit knows no such dtype.
    """
    try:
        return fused_bytes(base, dtype_from_name(options.lora_merge_dtype))
    except RuntimeError as error:
        raise CartError(f"--lora-merge-dtype: {error}; write float32, or bfloat16") from None


def _folders(config: MergeConfiguration, options: MergeOptions, cache: Path) -> dict[str, Path]:
    """Where the whole models of a recipe belong, by label.

    Raises:
        CartError: an adapter is none, or two are one and the same: it would count once.
    """
    made: dict[str, Path] = {}
    labels: dict[Path, str] = {}
    for label, model in references(config).items():
        if model.lora is None:
            continue
        base, adapter = Path(model.model.path), Path(model.lora.path)
        _check(adapter)
        made[label] = cache / _key(base, adapter, options.lora_merge_dtype or "")
        other = labels.setdefault(made[label], label)
        if other != label:
            raise CartError(
                f"{other} and {label} are one model: their adapters hold the same files; name one "
                "of them only (`weight` makes a model count more)"
            )
    return made


def _check(adapter: Path) -> None:
    """Refuse an adapter that is none, before its bytes are read.

    Raises:
        CartError: its config or its weights are missing, broken or truncated.
    """
    if (file := weights_file(adapter)).name == PICKLED:
        read_header(file, f"adapter {adapter}")
    else:
        open_adapter(adapter, str(adapter))


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _key(base: Path, adapter: Path, dtype: str) -> str:
    """What a whole model depends on: the adapter's bytes, and what changes when the base does."""
    parts: list[Any] = [_REVISION, dtype, version("peft"), version("transformers")]
    own = {file.name: file for file in adapter.iterdir() if file.name.startswith("adapter_")}
    own |= side_files.belongings(adapter) | side_files.module_weights(adapter)
    parts += [(name, _digest(file)) for name, file in sorted(own.items()) if file.is_file()]
    named = {file.name: file for file in base.iterdir() if file.is_file()}
    named |= side_files.belongings(base) | side_files.module_weights(base)
    parts += [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for _, file in sorted(named.items())
    ]
    return "fused-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def main() -> None:
    """Fuse the adapter of the command line: BASE ADAPTER OUT DTYPE."""
    base, adapter, out, dtype = sys.argv[1:]
    try:
        _fuse(Path(base), Path(adapter), Path(out), dtype)
    except Exception as error:  # whatever PEFT makes of a foreign adapter
        raise SystemExit(
            str(error) if isinstance(error, CartError) else first_line(error)
        ) from None


def _fuse(base: Path, adapter: Path, out: Path, dtype: str) -> None:
    from peft import PeftModel

    held = headers(str(base), base)
    kind = model_class(held.config, str(base))
    settings = None  # as the folder has them
    if left := left_quantisation(held):
        for part in left:
            del part["quantization_config"]
        settings = kind.config_class.from_dict(held.config)
    model = kind.from_pretrained(base, config=settings, dtype=dtype_from_name(dtype) or "auto")
    with warnings.catch_warnings():
        # PEFT goes on without what it cannot place, and the result is the base.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    whole.save_pretrained(out)
    side_files.complete(out, [adapter, base])  # an adapter may bring its own tokenizer
