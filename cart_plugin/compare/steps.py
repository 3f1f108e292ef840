"""The comparison as steps that are done once: merge each variant, judge each model, keep records.

A finished step is a JSON file beside its log, with the fingerprint of all that decides its result:
recipe, inputs, versions, evaluator, and the files that this has read. The same comparison started
again finds it and goes on after it; anything else is done anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cart_plugin import linalg, mergekit, merging
from cart_plugin.checkpoints.files import read_json, write_json, write_text
from cart_plugin.checkpoints.side_files import belongings, module_weights
from cart_plugin.compare.reads import changed
from cart_plugin.compare.variants import Variant, find_method
from cart_plugin.doctor.layout import references, tokenizer_models
from cart_plugin.doctor.parameters import is_cart
from cart_plugin.errors import CartError, first_line
from cart_plugin.execution import child
from cart_plugin.execution.inputs import Inputs, merge_options, written
from cart_plugin.execution.merge import merge

Keep = Literal["none", "best", "all"]
PACKAGES = (
    *("cart-plugin", "mergekit", "torch", "transformers", "tokenizers", "safetensors", "peft"),
    *("lm-eval", "datasets"),
)
_REVISIONS = [linalg.REVISION, merging.REVISION, mergekit.REVISION]
MODEL = "model"  # a variant's merged folder


@dataclass
class Row:
    """One line of the comparison: an input model, a merged one, or one that was merged elsewhere.

    Attributes:
        name: of the line, and of its folder under the output.
        kind: what it is.
        model: the folder that is evaluated; for an input that is a base and an adapter, one that
            mergekit makes of them.
        method: merge method, empty for inputs.
        settings: the method's settings that hold for the whole recipe.
        state: what is happening to it: waiting, merging, evaluating, done or failed.
        metrics: by task, from the evaluator.
        error: why it failed.
        note: why it was merged tensor by tensor, if it was.
        warning: what the merge has warned of, or what else went wrong, though there are figures.
        merge_seconds: duration of mergekit's process.
        evaluate_seconds: duration of the evaluator's process.
    """

    name: str
    kind: Literal["base", "model", "other", "merged"]
    model: str
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    state: str = "waiting"
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: str = ""
    note: str = ""
    warning: str = ""
    merge_seconds: float | None = None
    evaluate_seconds: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the tasks whose metric is better when higher; None if there is none."""
        values = [entry["value"] for entry in self.metrics.values() if entry["higher_is_better"]]
        return sum(values) / len(values) if values else None


def title_of(name: str) -> str:
    """A row's name as a reader wants it."""
    return name.removeprefix("input-").removeprefix("also-")


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        inputs: the recipe's models.
        variants: what to merge.
        request: the evaluator and its options, for `judge`.
        out: the folder of all results.
        keep: which merged models stay on the disk.
        options: further options of mergekit's command line; random methods start from seed 0
            unless they say otherwise.
        also: folders of models that are judged as they are.
    """

    inputs: Inputs
    variants: Sequence[Variant]
    request: Mapping[str, Any]
    out: Path
    keep: Keep = "none"
    options: Sequence[str] = ()
    also: Sequence[Path] = ()

    def rows(self) -> list[Row]:
        """The lines of the table in their order: base, fine-tuned, others' models, merged ones."""
        base = self.inputs.config.base_model
        fused = self._adapters()
        rows = [
            Row(
                name,
                "base" if label == str(base) else "model",
                str(
                    self.out / name / MODEL
                    if name in fused
                    else self.inputs.checkpoints[label].path.resolve()
                ),
            )
            for label, name in self._input_names().items()
        ]
        others = _short_names([str(folder.resolve()) for folder in self.also])
        rows += [Row(f"also-{name}", "other", path) for path, name in others.items()]
        for variant in self.variants:
            folder = self.out / variant.name / MODEL
            rows.append(Row(variant.name, "merged", str(folder), variant.method, variant.settings))
        return rows

    def _input_names(self) -> dict[str, str]:
        """The rows' names of the inputs by label, the base model first."""
        base = str(self.inputs.config.base_model)
        labels = sorted(self.inputs.checkpoints, key=lambda label: label != base)
        return {label: f"input-{name}" for label, name in _short_names(labels).items()}

    def _adapters(self) -> dict[str, Variant]:
        """Recipes that make a folder of each input that is a base and an adapter, by row."""
        names = self._input_names()
        found = {}
        models = references(self.inputs.config)
        for label in self.inputs.adapters:
            entry = {"model": written(models[label])}
            recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [entry]}
            if self.inputs.config.dtype is not None:
                recipe["dtype"] = self.inputs.config.dtype
            found[names[label]] = Variant(names[label], "", recipe, {})
        return found

    def run(self, rows: Sequence[Row], show: Callable[[], None]) -> None:
        """Do all steps that are not done; a failed one fails its row only.

        Args:
            rows: from `rows`; filled in.
            show: called when a row has changed.
        """
        variants = {variant.name: variant for variant in self.variants} | self._adapters()
        for row in rows:
            try:
                if row.kind == "merged":
                    _check_evaluator(rows)
                self._do(row, variants.get(row.name), rows, show)
                row.state = "done"
            except Exception as error:  # a full disk, a broken file: the others go on
                row.state = "failed"
                row.error = str(error) if isinstance(error, CartError) else first_line(error)
            show()
        self._tidy(rows)
        for row in self._kept(rows):  # an earlier run may have kept less
            try:
                self._merge(row, self.out / row.name, self._merge_key(variants[row.name]), show)
            except Exception as error:
                row.warning = f"evaluated, but not made again to be kept: {first_line(error)}"
            row.state = "done"
            show()

    def _do(
        self, row: Row, variant: Variant | None, rows: Sequence[Row], show: Callable[[], None]
    ) -> None:
        folder = self.out / row.name
        folder.mkdir(parents=True, exist_ok=True)
        merged = ""
        if variant is not None:
            recipe = folder / "recipe.yaml"
            command = shlex.join(
                ["mergekit-cart", "merge", str(recipe.resolve()), "OUT", *self._options()]
            )
            text = yaml.safe_dump(dict(variant.recipe), sort_keys=False)
            write_text(recipe, f"# {command}\n{text}")
            if variant.error:
                raise CartError(variant.error)
            merged = self._merge_key(variant)
            known = _finished(folder / "merge.json", merged) or {}
            row.note, row.merge_seconds = known.get("note", ""), known.get("seconds")
            row.warning = known.get("warning", "")
        judged = {
            "request": dict(self.request),
            "model": merged or _identity(row.model),
            "versions": versions(),
        }
        key = _digest(judged)
        done = _finished(folder / "evaluation.json", key)
        if done is None or changed(done.get("read", {})):
            if variant is not None:
                self._merge(row, folder, merged, show)
            row.state = "evaluating"
            show()
            done = self._judge(row, folder, key)
        row.metrics, row.evaluate_seconds = done["metrics"], done["seconds"]
        if variant is not None:
            self._tidy(rows)

    def _merge_key(self, variant: Variant) -> str:
        method = find_method(variant.recipe["merge_method"])
        return _digest(
            {
                "recipe": dict(variant.recipe),
                "inputs": {
                    label: _identity(str(checkpoint.path))
                    for label, checkpoint in self.inputs.checkpoints.items()
                }
                | _tokenizers(self.inputs),
                "adapters": {
                    label: _identity(path) for label, path in self.inputs.adapters.items()
                },
                "versions": versions(),
                # Those of other methods are the versions' alone.
                "revisions": _REVISIONS if is_cart(method) else [],
                "options": list(self.options),
            }
        )

    def _merge(self, row: Row, folder: Path, key: str, show: Callable[[], None]) -> None:
        model = folder / MODEL
        if _finished(folder / "merge.json", key) is not None and model.is_dir():
            return
        row.state = "merging"
        show()
        (folder / "merge.json").unlink(missing_ok=True)  # it must not vouch for another model
        _remove(model)
        for left in folder.glob(".merging-*"):  # of a run that was cut off
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=".merging-", dir=folder))
        try:
            started = time.perf_counter()
            recipe, log = folder / "recipe.yaml", folder / "merge.log"
            (scratch / "work").mkdir()
            options = merge_options(self._options())
            done = merge(recipe, scratch / MODEL, options, log=log, scratch=scratch / "work")
            row.note, row.warning = done.note, "; ".join(done.warnings)
            row.merge_seconds = round(time.perf_counter() - started, 2)
            (scratch / MODEL).rename(model)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        record = {"note": row.note, "warning": row.warning, "seconds": row.merge_seconds}
        write_json(folder / "merge.json", {"key": key, **record})

    def _options(self) -> list[str]:
        """The options of mergekit's command line."""
        return ["--random-seed", "0", *self.options]

    def _judge(self, row: Row, folder: Path, key: str) -> dict[str, Any]:
        started = time.perf_counter()
        answer = ask(self.request, row.model, folder)
        done = {
            "key": key,
            "metrics": answer["metrics"],
            "read": answer.get("read", {}),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(folder / "evaluation.json", done)
        return done

    def _tidy(self, rows: Sequence[Row]) -> None:
        """Remove the merged models that are not to be kept."""
        kept = [row.name for row in self._kept(rows)]
        for row in rows:
            # A model that the evaluator failed on waits for a better one.
            judged = bool(row.metrics) or (self.keep == "none" and row.state == "failed")
            ours = Path(row.model).parent == self.out / row.name  # not an input's own folder
            if ours and judged and row.name not in kept:
                _remove(Path(row.model))

    def _kept(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose merged models stay."""
        merged = [row for row in rows if row.kind == "merged" and row.metrics]
        ranked = [row for row in merged if row.mean is not None]
        if self.keep == "best" and ranked:
            return sorted(ranked, key=lambda row: row.mean or 0.0)[-1:]
        return [] if self.keep == "none" else merged  # without a mean none is the best


def _check_evaluator(rows: Sequence[Row]) -> None:
    """Refuse to merge for an evaluator that fails on every input: it would on every merge."""
    inputs = [row for row in rows if row.kind in ("base", "model")]
    if inputs and all(row.state == "failed" for row in inputs):
        raise CartError(f"not merged, since no input could be evaluated: {inputs[-1].error}")


def ask(request: Mapping[str, Any], model: str | None, folder: Path) -> dict[str, Any]:
    """Have a child process judge a model, or, with None for it, check the evaluator.

    Raises:
        CartError: it failed; the message is one line.
    """
    asked, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    write_json(asked, {**request, "model": model})
    log = folder / "evaluation.log"
    error = child.run("cart_plugin.compare.judge:main", [str(asked), str(answer)], log)
    try:
        found = read_json(answer)
    except (OSError, ValueError):
        raise CartError(f"the evaluator ended: {error} (see {log})") from None
    finally:
        asked.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if "error" in found:
        raise CartError(found["error"])
    return found


def versions() -> dict[str, str]:
    """The versions of what merges and evaluates."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def needed_bytes(comparison: Comparison) -> int:
    """Disk space for the merged models that exist at one time, beyond those already there."""
    waiting = [
        variant
        for variant in comparison.variants
        if not (comparison.out / variant.name / MODEL).is_dir()
    ]
    at_once = {"none": 1, "best": 2, "all": len(waiting)}[comparison.keep]
    fused = len(comparison.inputs.adapters)  # for the time of a merge
    return (min(at_once, len(waiting)) + fused) * comparison.inputs.bytes


def _identity(path: str) -> list[Any]:
    """What changes when a model folder changes: names, sizes and times of its files."""
    folder = Path(path)
    files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    files |= belongings(folder) | module_weights(folder)  # in the folders of modules.json
    return [
        [name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in sorted(files.items())
    ]


def _tokenizers(inputs: Inputs) -> dict[str, list[Any]]:
    """The identity of each folder that a tokenizer, or a token's row, is taken from."""
    models = tokenizer_models(inputs.config).items()
    folders = {label: model.model.path for label, model in models}
    return {label: _identity(path) for label, path in folders.items() if Path(path).is_dir()}


def _remove(folder: Path) -> None:
    """Remove a folder so that nothing that is left of it, if this is cut off, looks whole."""
    if folder.exists():
        doomed = Path(tempfile.mkdtemp(prefix=".merging-", dir=folder.parent))
        folder.rename(doomed / folder.name)
        shutil.rmtree(doomed, ignore_errors=True)


def _short_names(labels: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that tell the models apart."""
    parts = {label: label.rstrip("/").split("/") for label in labels}
    for length in range(1, max(map(len, parts.values()), default=1) + 1):
        names = {label: "_".join(steps[-length:]) for label, steps in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if record.get("key") == key else None
