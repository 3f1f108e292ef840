"""A model in memory with adapters of several tasks, whose weights take what is merged of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters.formulas import Factors

Judge = Callable[[Any, Sequence[str]], dict[str, float]]
Deltas = Mapping[str, Tensor]
"""What is added to weights ``(m, n)``, by the names of their layers."""


class Loaded:
    """A model with adapters.

    Attributes:
        peft: the model as PEFT has it, with an adapter a task, by the task's name.
        folders: of the adapters, by task.
        multiplies: `taken` forms what an adapter adds to weights; not where only the making of the
            adapter is measured.
    """

    multiplies = True

    def __init__(self, model: torch.nn.Module, folders: Mapping[str, Path], judge: Judge) -> None:
        """Load the adapters.

        Args:
            model: the base, in fp32.
            folders: of the adapters, by task.
            judge: takes the base with other weights, and tasks; returns their accuracies, 0 to 1.
        """
        from peft import PeftModel

        first, *others = folders
        self.folders = dict(folders)
        self.peft: Any = PeftModel.from_pretrained(model, str(folders[first]), adapter_name=first)
        for name in others:
            self.peft.load_adapter(str(folders[name]), adapter_name=name)
        self.peft.eval()
        self._judge = judge

    @property
    def layers(self) -> dict[str, Any]:
        """Those that the adapters change."""
        from peft.tuners.lora import LoraLayer

        return {
            name: layer for name, layer in self.peft.named_modules() if isinstance(layer, LoraLayer)
        }

    def factors(self, tasks: Sequence[str]) -> dict[str, list[Factors]]:
        """The adapters' differences, by layer."""
        with torch.no_grad():
            return {
                name: [
                    Factors(
                        layer.scaling[task] * layer.lora_B[task].weight,
                        layer.lora_A[task].weight.clone(),
                    )
                    for task in tasks
                ]
                for name, layer in self.layers.items()
            }

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        """What one adapter adds to the weights."""
        with torch.no_grad():
            return {name: layer.get_delta_weight(adapter) for name, layer in self.layers.items()}

    def taken(self, add: Callable[[str], object]) -> dict[str, Tensor]:
        """What an adapter adds that a function makes, called by the name it is given."""
        name = "merged"
        add(name)
        found = self.deltas(name) if self.multiplies else {}
        self.peft.delete_adapter(name)
        return found

    def judge(self, deltas: Deltas, tasks: Sequence[str], scale: float = 1.0) -> dict[str, float]:
        """Accuracies of the base with what is added to its weights."""
        layers = self.layers
        kept = {name: layers[name].get_base_layer().weight.detach().clone() for name in deltas}
        with torch.no_grad(), self.peft.disable_adapter():
            try:
                for name, delta in deltas.items():
                    layers[name].get_base_layer().weight.add_(delta, alpha=scale)
                return self._judge(self.peft.get_base_model(), tasks)
            finally:
                for name, weight in kept.items():
                    layers[name].get_base_layer().weight.copy_(weight)
