"""AdaMerging of the text suite's encoders in FusionBench, plain and from CART: heads stay outside.

The loop is the plugin's own (`cart_plugin.fusion_bench.adaptation`), as for the images of the
vision suite; here are its inputs: texts, the mean of whose token states goes to a head a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from benchmarks.common.heads import Head
from benchmarks.text.encoder import features
from cart_plugin.fusion_bench.adamerging import CartAdaMerging, PlainAdaMerging
from cart_plugin.fusion_bench.adaptation import Adaptation


class TextInputs(Adaptation):
    """Texts of a sequence classification pool of encoders, and a head a task.

    Args:
        heads: folders with `head.safetensors`, by task.
        **kwargs: parameters of `Adaptation`.
    """

    _config_mapping = Adaptation._config_mapping | {"heads": "heads"}

    def __init__(self, heads: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = dict(heads)

    def prepare_inputs(self, pool: BaseModelPool) -> None:
        """Load tokenizer, texts and heads."""
        self._tokenizer = pool.load_tokenizer()
        self._texts = {task: list(pool.load_test_dataset(task)) for task in pool.model_names}
        self._heads = {task: Head.load(Path(self.heads[task])) for task in pool.model_names}

    def batches(self, task: str) -> Iterator[list[str]]:
        """Shuffled texts, in rounds over all of them."""
        texts = self._texts[task]
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch_size, len(texts))
        while True:
            order = torch.randperm(len(texts), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield [texts[position] for position in order[start : start + size]]

    def logits(self, model: nn.Module, batch: Any, task: str) -> Tensor:
        """The task's head on the merged encoder."""
        return self._heads[task](features(model, self._tokenizer, batch))


class TextAdaMerging(TextInputs, PlainAdaMerging):
    """Plain AdaMerging.

    Args:
        **kwargs: parameters of `TextInputs` and of `PlainAdaMerging`.
    """

    _config_mapping = PlainAdaMerging._config_mapping | TextInputs._config_mapping


class TextCartAdaMerging(TextInputs, CartAdaMerging):
    """CART + AdaMerging.

    Args:
        **kwargs: parameters of `TextInputs` and of `CartAdaMerging`.
    """

    _config_mapping = CartAdaMerging._config_mapping | TextInputs._config_mapping
