"""MiniLM with prototype heads: what is fine-tuned, merged and judged in the text suite.

The encoder is a `transformers.BertModel`; a text's feature is the mean of its tokens' last hidden
states, as the model was trained. The heads are those of the vision suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import BertModel

TOKENS = 64  # of a text; the rest is cut off
BATCH = 64


def load_encoder(folder: Path) -> BertModel:
    """Load an encoder in eval mode, without dropout; refuse a folder that lacks weights of it."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, report = BertModel.from_pretrained(
        folder,
        output_loading_info=True,
        hidden_dropout_prob=0.0,  # fine-tuning is to depend on its seed only
        attention_probs_dropout_prob=0.0,
    )
    # The pooler has a part in no feature; some checkpoints come without.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of the encoder, for example {missing[0]}"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of an encoder's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def features(model: BertModel, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Mean token states (N, width) of one batch of texts."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    states = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


@torch.no_grad()
def all_features(model: BertModel, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Features (N, width) of any number of texts; those of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]))
    found: list[torch.Tensor] = []
    for start in range(0, len(order), BATCH):
        chosen = [texts[position] for position in order[start : start + BATCH]]
        found.append(features(model, tokenizer, chosen))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(found)[back]
