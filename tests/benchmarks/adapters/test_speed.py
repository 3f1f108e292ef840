"""What merging adapters costs, on small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.adapters import speed


@pytest.mark.slow
def test_it_measures_both_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "SHAPES", {"self_attn.k_proj": (24, 32), "mlp.down_proj": (32, 48)})
    monkeypatch.setattr(speed, "RANKS", (2,))
    for _ in range(2):
        done = CliRunner().invoke(
            speed.main, ["--quick", "--runs", "1", "--out", str(tmp_path)], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        monkeypatch.setattr(speed, "whole_run", None)  # known by now
    cases = json.loads((tmp_path / "speed.json").read_text())["cases"]
    assert cases.keys() == {"whole, rank 2", "self_attn.k_proj, rank 2"}
    assert all(value > 0 for case in cases.values() for value in case.values())
    table = (tmp_path / "speed.md").read_text()
    assert "| self_attn.k_proj, 24 x 32 | 2 |" in table
    assert not (tmp_path / "cache" / "adapter-speed").exists()
