"""What belongs to a model beside its weights comes along, whatever it is called."""

from __future__ import annotations

from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.execution.completion import add_side_files


def test_code_and_odd_vocabularies_come_along_but_weights_and_records_do_not(
    tmp_path: Path,
) -> None:
    donor, out = tmp_path / "donor", tmp_path / "out"
    donor.mkdir()
    out.mkdir()
    own = {"config.json", "modeling_own.py", "tokenizer.model.v3", "preprocessor_config.json"}
    others = {"model.safetensors", "model.safetensors.index.json", "README.md", "optimizer.pt"}
    for name in own | others:
        (donor / name).write_text("{}")
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": [{"model": str(donor)}]}
    )
    add_side_files(out, donor, config, MergeOptions())
    assert {path.name for path in out.iterdir()} == own
