"""Checks of inputs that are a model and a LoRA adapter: does the one fit the other?

mergekit fuses them by PEFT and looks at neither before. A failure leaves an empty folder in the
cache that the next run takes for the fused model; an adapter of another base fits without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cart_plugin.checkpoints import adapters, names
from cart_plugin.checkpoints.adapters import LORA, weights_file
from cart_plugin.checkpoints.headers import TensorInfo, read_header
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, Checkpoint, read_config
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.errors import CartError, CheckpointError
from cart_plugin.wording import count, some

_PROMPTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
    "ADAPTION_PROMPT",
)

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """What an adapter changes: a weight of its base, the shapes that fit it, and by which rank."""

    name: str
    shapes: tuple[_Shape, ...]
    rank: int


def check_cache(config: Recipe) -> list[Finding]:
    """Say what mergekit needs for inputs with an adapter: a flag that the recipe cannot give."""
    fused = [label for label, model in references(config).items() if model.lora is not None]
    if not fused:
        return []
    return [
        warning(
            f"{count(len(fused), 'input')} with LoRA ({some(fused, 1)}): mergekit stops at once "
            "without --lora-merge-cache, which no recipe can set",
            "pass --lora-merge-cache FOLDER to mergekit, a new FOLDER after each change of an "
            "adapter or failed merge: what lies there is used again, unchecked",
        )
    ]


def check_fit(adapter: Path, name: str, model: Checkpoint) -> list[Finding]:
    """Compare an adapter with the model that it is put on.

    Args:
        adapter: its folder.
        name: as the recipe writes it.
        model: the model's headers.
    """
    who = f"adapter {name}"
    try:
        config = read_config(adapter, who, ADAPTER_CONFIG)
        tensors = read_header(weights_file(adapter), who)
    except CheckpointError as error:
        return [problem(error.fact, error.advice)]
    kind = str(config.get("peft_type", LORA)).upper()
    if kind in _PROMPTS:
        return [
            problem(
                f"{who} is a {kind}: its vectors go before the input, and not into the weights",
                "merge adapters that change weights, such as LoRA",
            )
        ]
    shapes = list(_check_shapes(who, list(_parts(tensors, config)), model)) if kind == LORA else []
    return shapes or list(_check_base(who, config, model))


def ranks(adapter: Path) -> dict[str, int]:
    """The ranks that an adapter adds to its model's weights, by their names there.

    As its factors have them, which is what `r` and `rank_pattern` of its config come to; nothing of
    files that cannot be read, or of DoRA, which scales the model's own weights as well.
    """
    try:
        config = read_config(adapter, str(adapter), ADAPTER_CONFIG)
        if config.get("use_dora") or str(config.get("peft_type", LORA)).upper() != LORA:
            return {}
        tensors = read_header(weights_file(adapter), "")
        return {part.name: part.rank for part in _parts(tensors, config)}
    except CheckpointError:
        return {}


def _check_shapes(who: str, parts: Sequence[_Part], model: Checkpoint) -> Iterator[Finding]:
    held: Mapping[str, _Shape] = {name: info.shape for name, info in model.tensors.items()}
    if any(part.name not in held for part in parts):
        try:
            held = {**held, **_models_own(model)}
        except CartError:
            return  # nobody knows its names but its own code
    unknown = [part.name for part in parts if part.name not in held]
    if unknown:
        yield problem(
            f"{who} changes {count(len(unknown), 'weight')} that model {model.path} does not have "
            f"({some(unknown)}); PEFT leaves them out in silence, or stops",
            "name the model that the adapter was trained on",
        )
        return
    unlike = [part for part in parts if held[part.name] not in part.shapes]
    if not unlike:
        return
    first = unlike[0]
    mine, base = first.shapes[0], held[first.name]
    rows = {held[part.name][0] for part in unlike}
    if all(_is_longer(part, held[part.name]) for part in unlike) and rows <= _vocabularies(model):
        yield problem(
            f"{who} was trained with new tokens: {first.name} has {mine[0]:,} rows in it and "
            f"{base[0]:,} in model {model.path}; PEFT stops",
            f"fuse it first: load the model, resize_token_embeddings({mine[0]}), "
            "PeftModel.from_pretrained, merge_and_unload, save_pretrained with the adapter's "
            "tokenizer, and name that folder",
        )
        return
    yield problem(
        f"{who} does not fit model {model.path}: {first.name} is {mine} in it and {base} there"
        + (f"; also {some([part.name for part in unlike[1:]])}" if unlike[1:] else "")
        + "; PEFT stops",
        "name the model that the adapter was trained on",
    )


def _parts(tensors: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Iterator[_Part]:
    """What an adapter changes, but for its `target_parameters`: no name of it says which."""
    held = adapters.sort(tensors)
    for pair in held.factors:
        if adapters.is_of_parameter(pair.module, config):
            continue
        name = f"{adapters.plain_name(pair.module)}.weight"
        a, b = tensors[pair.a].shape, tensors[pair.b].shape
        if pair.is_embedding:
            yield _Part(name, ((a[1], b[0]),), a[0])
        else:
            shape = (b[0], *a[1:])
            # GPT-2's Conv1D holds its matrices the other way round.
            yield _Part(name, (shape, shape[::-1]), a[0])
    for stored in held.whole:  # such as those of `modules_to_save`
        shape = tensors[stored].shape
        yield _Part(adapters.plain_name(stored), (shape,), min(shape, default=1))


def _models_own(model: Checkpoint) -> dict[str, _Shape]:
    """Shapes by the model's names, which files of several architectures do not use."""
    built = names.meta_model(model.path, model.config, str(model.path))
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _is_longer(part: _Part, base: _Shape) -> bool:
    mine = part.shapes[0]
    return len(mine) == len(base) and mine[0] > base[0] and mine[1:] == base[1:]


def _vocabularies(model: Checkpoint) -> set[object]:
    text = model.config.get("text_config")
    return {held.get("vocab_size") for held in (model.config, text) if isinstance(held, dict)}


def _check_base(who: str, config: Mapping[str, object], model: Checkpoint) -> Iterator[Finding]:
    """Compare the base that the adapter's config names with the one it is put on."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or _is_named(named, model.path):
        return
    yield warning(
        f"{who} was trained on {named} and is put on {model.path}; its shapes fit any model of the "
        "size, and on other weights it means nothing",
        f"write {named}, or make sure that the two are the same",
    )


def _is_named(named: str, folder: Path) -> bool:
    """Whether a folder is, or looks like, what a name stands for: a path or an id on the hub."""
    real = Path(os.path.realpath(folder))
    if os.path.exists(named) and Path(os.path.realpath(named)) == real:
        return True
    last = os.path.basename(named.rstrip("/")).lower()
    cached = f"models--{named.replace('/', '--')}".lower()
    return any(part.lower() in (last, cached) for part in real.parts)
