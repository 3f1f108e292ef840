"""Of the models one tensor is in memory at a time, however many they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compress.models import new_model

# Not `getrusage`: its peak begins with that of the process that started this one.
STATUS = Path("/proc/self/status")
SCRIPT = """
import sys
from pathlib import Path
from cart_plugin.compress import compress
compress(sys.argv[2:], sys.argv[1], rank=4, svd="exact")
(peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_more_models_take_no_more_memory(tmp_path: Path) -> None:
    model = new_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    folders = [tmp_path / str(number) for number in range(6)]
    for folder in folders:
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
        model.save_pretrained(folder)
    size = (folders[0] / "model.safetensors").stat().st_size / 2**20

    def peak(count: int) -> int:
        command = [sys.executable, "-c", SCRIPT, tmp_path / f"out-{count}", *folders[:count]]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(run.stdout)

    two, six = peak(2), peak(6)
    assert size > 30
    assert six - two < size  # of the four more models, less than one
