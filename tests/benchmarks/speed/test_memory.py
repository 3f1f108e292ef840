"""The table of the memory benchmark."""

import json

from benchmarks.common.measure import RESULTS
from benchmarks.speed.memory import METHODS, markdown


def test_the_table_says_what_was_merged_and_has_a_row_a_method() -> None:
    row = {"wall_s": 12.34, "cpu_s": 5.67, "peak_mb": 891.2, "peaks_mb": [891.2]}
    machine = {"cores": 2, "processor": "Some CPU"}
    measured = [{"cart_plugin": "0.1.0", "commit": "abc", "date": "2026-01-01"}]
    result = {"runs": 3, "machine": machine, "measured": measured}
    result["methods"] = dict.fromkeys(METHODS, row)
    first, *lines = markdown(result).splitlines()
    assert "4 Llama-shaped models of 103 M parameters in bf16" in first
    assert "medians of 3 merges" in first
    assert "`make bench-memory` (cart-plugin 0.1.0, commit abc, 2026-01-01)" in first
    assert "| cart, no base | 12.3 | 5.7 | 891 |" in lines
    assert len(lines) == 3 + len(METHODS)


def test_the_saved_table_is_that_of_the_saved_figures() -> None:
    result = json.loads((RESULTS / "speed" / "merge_memory.json").read_text())
    assert (RESULTS / "speed" / "merge_memory.md").read_text() == markdown(result)
