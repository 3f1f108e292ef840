"""mergekit's own merge of one recipe, checked against what its inputs hold.

`mergekit-yaml` does it where its architecture support is whole. mergekit 0.1.5 cannot plan bare
encoders (`BertModel`, `CLIPModel`) and leaves out tensors of others without a word (DINOv2, ViT):
then `mergekit-pytorch` merges the same recipe tensor by tensor, and the folder is completed here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions, add_merge_options

from cart_plugin.checkpoints import side_files
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.compare import child
from cart_plugin.doctor import inputs as files
from cart_plugin.doctor import planning, result, schema
from cart_plugin.doctor.findings import Finding, Level, count, some
from cart_plugin.doctor.layout import references
from cart_plugin.doctor.parameters import check_method
from cart_plugin.errors import CartError

FLAT_RECIPE = "recipe-flat.yaml"  # beside a variant's recipe: the one for mergekit-pytorch
# In the doctor's words: what is not the recipe's fault but mergekit's support of the architecture.
_ARCHITECTURE = ("would silently drop", "that mergekit requires of this architecture")


@dataclass(frozen=True)
class Inputs:
    """A recipe's models.

    Attributes:
        config: the recipe as mergekit reads it.
        checkpoints: headers by label.
    """

    config: MergeConfiguration
    checkpoints: Mapping[str, Checkpoint]

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters' folders by label of those inputs that are a base and an adapter."""
        named = references(self.config)
        return {label: model.lora.path for label, model in named.items() if model.lora is not None}

    @property
    def bytes(self) -> int:
        """Bytes of the largest model."""
        return max(
            sum(info.bytes for info in checkpoint.tensors.values())
            for checkpoint in self.checkpoints.values()
        )


def read_inputs(document: Mapping[str, Any]) -> Inputs:
    """Read a recipe and the headers of its models.

    Raises:
        CartError: it is no recipe for mergekit-yaml, or a model cannot be read.
    """
    recipe = dict(document)
    if schema.recipe_class(recipe) is not MergeConfiguration:
        raise CartError("compare takes recipes of model folders (mergekit-yaml), not weight files")
    config, findings = schema.parse(recipe, MergeConfiguration)
    _stop_at(findings)
    if not isinstance(config, MergeConfiguration):
        raise CartError("mergekit rejects the recipe")
    found: dict[str, Checkpoint] = {}
    for label, model in references(config).items():
        path, findings = files.locate(model.model.path, "model")
        _stop_at(findings)
        if path is None:
            raise CartError(
                f"model {label} is not a local folder; download it (`hf download {label} "
                "--local-dir FOLDER`) and write FOLDER in the recipe"
            )
        checkpoint, findings = files.read_folder(label, path)
        _stop_at([*findings, *files.check_dtypes(checkpoint)])
        if model.lora is not None:
            _stop_at(files.check_adapter(model.lora.path))
        found[label] = checkpoint
    return Inputs(config, found)


def _stop_at(findings: Iterable[Finding]) -> None:
    for finding in findings:
        if finding.level is Level.PROBLEM:
            raise CartError(f"{finding.fact}; {finding.advice}" if finding.advice else finding.fact)


def merge(recipe: Path, out: Path, options: Sequence[str], log: Path) -> str:
    """Merge a recipe into a new folder.

    Args:
        recipe: the YAML file.
        out: the folder, which must not exist.
        options: further options of mergekit's command line.
        log: receives mergekit's output.

    Returns:
        Why the merge went tensor by tensor; empty if mergekit-yaml did it.

    Raises:
        CartError: mergekit failed, or tensors that all inputs share are not in the result.
    """
    document = yaml.safe_load(recipe.read_text())
    inputs = read_inputs(document)
    reason, wanted = _plan(inputs, merge_options(options))
    if reason:
        _merge_flat(document, inputs, recipe.with_name(FLAT_RECIPE), out, options, log)
    else:
        _run("mergekit.scripts.run_yaml:main", [str(recipe), str(out), *options], log)
    _check(out, wanted)
    # From the base model, or else the first one: config, tokenizer, processor.
    first = inputs.config.base_model or next(iter(references(inputs.config).values()))
    side_files.complete(out, inputs.checkpoints[str(first)].path)
    return reason


def _run(function: str, arguments: Sequence[str], log: Path) -> None:
    error = child.run(function, arguments, log)
    if error:
        raise CartError(f"mergekit failed: {error} (see {log})")


def merge_options(arguments: Sequence[str]) -> MergeOptions:
    """Mergekit's options as its command line reads them.

    Raises:
        CartError: it does not take one of them.
    """

    @click.command()
    @add_merge_options
    def command(merge_options: MergeOptions) -> MergeOptions:
        return merge_options

    try:
        options: MergeOptions = command.main(list(arguments), standalone_mode=False)
    except click.ClickException as error:
        raise CartError(f"mergekit's options: {error.format_message()}") from None
    return options


def _plan(inputs: Inputs, options: MergeOptions) -> tuple[str, set[str]]:
    """Why mergekit-yaml would not make a whole model, and the tensors that the merge has to hold.

    The reason is empty if it will; then the tensors are those of its plan, else those that the
    inputs share.
    """
    shared = set.intersection(*(set(held.tensors) for held in inputs.checkpoints.values()))
    plan, findings = planning.plan(inputs.config, inputs.checkpoints, options)
    if plan is None:
        _check_alike(inputs, findings[0])
        return findings[0].fact, shared
    # What else is wrong with a recipe would be wrong tensor by tensor, too.
    method, _ = check_method(inputs.config.merge_method)
    if method is None:  # the caller has checked it
        raise CartError(f"unknown method {inputs.config.merge_method}")
    merges = result.match(plan, inputs.checkpoints)
    findings = result.check_plan(merges, inputs.checkpoints, inputs.config, method)
    problems = [finding for finding in findings if finding.level is Level.PROBLEM]
    for finding in problems:
        if any(text in finding.fact for text in _ARCHITECTURE):
            _check_alike(inputs, finding)
            return finding.fact, shared
    _stop_at(problems)
    return "", {planned.name for planned in plan if not planned.optional}


def _check_alike(inputs: Inputs, finding: Finding) -> None:
    """Refuse to merge tensor by tensor what is no architecture's fault but models that differ.

    Raises:
        CartError: mergekit's own objection, since a model lacks tensors of another, or has another
            shape.
    """
    # Buffers such as position ids come and go with versions of transformers.
    shapes = [
        {name: info.shape for name, info in held.tensors.items() if info.is_floating}
        for held in inputs.checkpoints.values()
    ]
    if any(held != shapes[0] for held in shapes):
        raise CartError(f"{finding.fact}; and the models do not hold the same tensors")


def _merge_flat(
    document: Mapping[str, Any],
    inputs: Inputs,
    recipe: Path,
    out: Path,
    options: Sequence[str],
    log: Path,
) -> None:
    """Merge weight files by mergekit-pytorch; `recipe` is written for it."""
    if "models" not in document or document.get("slices") or document.get("modules"):
        raise CartError(
            "mergekit does not support this architecture, and only whole models can be merged "
            "tensor by tensor: write them under `models:`"
        )
    if any(document.get(key) for key in ("tokenizer", "tokenizer_source", "chat_template")):
        raise CartError(
            "mergekit does not support this architecture, and tokenizers cannot be merged tensor "
            "by tensor: delete the recipe's tokenizer settings"
        )
    if inputs.adapters:
        raise CartError(
            "mergekit does not support this architecture, and adapters cannot be merged tensor "
            "by tensor: fuse them first (PEFT: merge_and_unload)"
        )
    scratch = recipe.parent / f"{out.name}-inputs"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        paths = {
            label: str(_one_file(checkpoint, scratch / f"{number}.safetensors"))
            for number, (label, checkpoint) in enumerate(inputs.checkpoints.items())
        }
        flat = {
            key: document[key] for key in ("merge_method", "parameters", "dtype") if key in document
        }
        if document.get("out_dtype"):
            flat["out_dtype"] = document["out_dtype"]
        if inputs.config.base_model is not None:
            flat["base_model"] = paths[str(inputs.config.base_model)]
        flat["models"] = [
            {**entry, "model": paths[str(given.model)]}
            for entry, given in zip(document["models"], inputs.config.models or (), strict=True)
        ]
        recipe.write_text(yaml.safe_dump(flat, sort_keys=False))
        arguments = [str(recipe), str(out), "--tensor-intersection", *options]
        _run("mergekit.scripts.merge_raw_pytorch:main", arguments, log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _one_file(checkpoint: Checkpoint, scratch: Path) -> Path:
    """The weights as one safetensors file: the model's own, or its shards put together."""
    own = checkpoint.path / "model.safetensors"
    if own.is_file():
        return own.resolve()
    from safetensors.torch import save_file

    index = ShardedTensorIndex.from_disk(str(checkpoint.path))
    from mergekit.io import LazyTensorLoader

    loader = LazyTensorLoader(index)
    # Copies: safetensors takes neither views nor tied tensors.
    tensors = {name: loader.get_tensor(name) for name in checkpoint.tensors}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, scratch)
    return scratch


def _check(out: Path, wanted: set[str]) -> None:
    """Compare the tensors of a finished merge with what it has to hold.

    Raises:
        CartError: some are missing, or there is nothing to hold.
    """
    written, findings = (
        files.read_folder("of the merge", out) if (out / "config.json").is_file() else _headers(out)
    )
    _stop_at(findings)
    if not wanted:
        raise CartError("the models have no tensor name in common: nothing was merged")
    missing = sorted(wanted - set(written.tensors))
    if missing:
        raise CartError(
            f"the merge lacks {count(len(missing), 'tensor')} that its inputs share: "
            f"{some(missing)}"
        )


def _headers(out: Path) -> tuple[Checkpoint, list[Finding]]:
    checkpoint = Checkpoint("of the merge", out)
    findings: list[Finding] = []
    for file in sorted(out.glob("*.safetensors")):
        part, problems = files.read_file("of the merge", file)
        checkpoint.tensors.update(part.tensors)
        findings += problems
    return checkpoint, findings
