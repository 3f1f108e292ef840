"""Recipes to compare, and the report of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

EVALUATORS = "tests.compare.evaluators"


def recipe_for(folders: list[str], file: Path, **more: Any) -> Path:
    document = {
        "merge_method": "cart",
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:]],
        "dtype": "float32",
        **more,
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def rows(out: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((out / "report.json").read_text())
    return {row["name"]: row for row in report["rows"]}
