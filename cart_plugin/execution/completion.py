"""What belongs to a merged model beside its weights: config, tokenizer, processors, card."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.card import generate_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.checkpoints import names, side_files, token_ids
from cart_plugin.checkpoints.agreement import left_quantisation
from cart_plugin.checkpoints.configs import parts
from cart_plugin.checkpoints.files import read_json, write_json, write_text
from cart_plugin.checkpoints.reading import CONFIG, Checkpoint
from cart_plugin.checkpoints.tokenizers import read_vocabulary, special_tokens
from cart_plugin.doctor.inputs import values
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import OrderedConfiguration, plain


def add_side_files(
    out: Path, donor: Path, config: MergeConfiguration, options: MergeOptions
) -> None:
    """Give a folder of weights the donor's files that it lacks.

    Of a tokenizer only where the merge has not made one: parts of two do not fit. Weights of
    modules are those that `side_files.check_modules` has found in all models.

    Raises:
        CartError: the merge should have made one, and has not.
    """
    made = bool(config.tokenizer or config.tokenizer_source)
    made = made or bool(config.chat_template and options.copy_tokenizer)
    if made and not (out / "tokenizer_config.json").exists():
        raise CartError(
            "mergekit could not write the tokenizer that the recipe asks for; look for its models' "
            "tokenizer files, or run again with -v"
        )
    found = side_files.belongings(donor) | side_files.module_weights(donor)
    for name, path in found.items():
        if side_files.is_tokenizer(name) and (made or not options.copy_tokenizer):
            continue
        side_files.put(path, out / name)


def add_card(out: Path, name: str, config: MergeConfiguration, source: str) -> None:
    """Write mergekit's model card, and the recipe."""

    def local(model: ModelReference) -> ModelReference:
        # mergekit asks the hub about paths that look like its names, and fails without a network.
        parts: dict[str, Any] = {"model": {"path": str(Path(model.model.path).absolute())}}
        if model.lora is not None:
            parts["lora"] = {"path": str(Path(model.lora.path).absolute())}
        return ModelReference.model_validate(parts)

    shown = OrderedConfiguration.model_validate(plain(config, local))
    write_text(out / "README.md", generate_card(shown, source.rstrip(), name))
    write_text(out / "mergekit_config.yml", source)


def renumber_tokens(
    out: Path, donor: Path, config: MergeConfiguration, options: MergeOptions
) -> None:
    """Number the tokens that the donor's configs name as the tokenizer does that the merge made.

    The rows of the embeddings are in that order; mergekit leaves the donor's numbers.
    """
    if not (config.tokenizer or config.tokenizer_source):
        return
    old, new = (_vocabulary(folder, options.trust_remote_code) for folder in (donor, out))
    if old is None or new is None:
        return
    ids = {token: number for number, token in new.items()}
    special = {role: ids[token] for role, token in special_tokens(out).items() if token in ids}
    for file in (out / CONFIG, out / side_files.GENERATION):
        try:
            held = read_json(file)
        except (OSError, ValueError):
            continue  # there is none, or nobody can read it
        before = copy.deepcopy(held)
        token_ids.renumber(held, old, ids, special)
        if held != before:
            write_json(file, held)


def _vocabulary(folder: Path, trust_remote_code: bool) -> Mapping[int, str] | None:
    """A tokenizer's tokens by number, as transformers makes them where its files do not say."""
    held = read_vocabulary(folder)
    if held is not None and held.is_whole:
        return held.tokens
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # mergekit has made one; of which files and code, only it knows
        return None
    return {number: token for token, number in made.get_vocab().items()}


def correct_config(written: Checkpoint) -> None:
    """Make config.json say what the weights are: dtype, vocabulary, what is tied, not quantised.

    Args:
        written: the merged model; `config` is changed with its file.

    Raises:
        CartError: transformers cannot build the model.
    """
    config = written.config
    for part in left_quantisation(written):
        del part["quantization_config"]
    sections = [section for _, section in parts(config)]
    if dtype := _dtype(written):
        for section in sections:
            for key in ("dtype", "torch_dtype"):
                if key in section or (section is config and key == "dtype"):
                    section[key] = dtype
    # One key in all: transformers 5 reads both, and the older one first.
    if "torch_dtype" in config and "dtype" in config:
        del config["torch_dtype"]
    write_json(written.path / CONFIG, config)
    try:
        model = names.meta_model(written.path, config, written.name)
    except ValueError:
        return  # a model that brings its own code
    _correct_vocabulary(config, sections, model, written)
    _correct_ties(config, sections, model, written)
    write_json(written.path / CONFIG, config)


def _dtype(written: Checkpoint) -> str:
    """The floating-point dtype that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for info in written.tensors.values():
        if info.dtype is not None and info.is_floating:
            sizes[info.dtype] += info.elements
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.") if sizes else ""


def _correct_vocabulary(
    config: dict[str, Any], sections: list[dict[str, Any]], model: Any, written: Checkpoint
) -> None:
    tables = names.vocabulary_names(model)
    state = model.state_dict()
    for unit in names.one_way(model, {name: info.shape for name, info in written.tensors.items()}):
        if unit.is_converted or not tables.intersection(unit.targets):
            continue
        rows = written.tensors[unit.sources[0]].shape[0]
        expected = state[unit.targets[0]].shape[0]
        if rows == expected:
            continue
        for section in sections:
            if section.get("vocab_size", expected if section is config else None) == expected:
                section["vocab_size"] = rows
        return


def _correct_ties(
    config: dict[str, Any], sections: list[dict[str, Any]], model: Any, written: Checkpoint
) -> None:
    """Untie what was saved apart with other values: loading would throw one of them away."""
    sources = {
        target: unit.sources[0]
        for unit in names.one_way(
            model, {name: info.shape for name, info in written.tensors.items()}
        )
        if not unit.is_converted
        for target in unit.targets
    }
    loader = values(written)
    for same in names.tied_names(model).values():
        held = [loader.get_tensor(sources[name]) for name in same if name in sources]
        if any(not torch.equal(tensor, held[0]) for tensor in held[1:]):
            config["tie_word_embeddings"] = False
            for section in sections:
                if "tie_word_embeddings" in section:
                    section["tie_word_embeddings"] = False
            return
