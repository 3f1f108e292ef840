"""vLLM's CPU engine: what it answers with adapters, or why it loads none. Run by `servers.run`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors reach this process
        "VLLM_NO_USAGE_STATS": "1",
    }
)

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    """Answer the request of the file named first in the file named second."""
    request = json.loads(Path(sys.argv[1]).read_text())
    vocabulary = request["vocabulary"]
    engine = LLM(
        model=request["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=request["max_rank"],
        max_loras=2,
        max_num_seqs=2,
        max_model_len=64,
        max_logprobs=vocabulary,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=vocabulary, detokenize=False
    )

    def answer(adapter: LoRARequest | None) -> list[list[float]]:
        prompt = {"prompt_token_ids": request["prompt"]}
        (found,) = engine.generate([prompt], sampling, lora_request=adapter, use_tqdm=False)
        rows = found.prompt_logprobs[1:]  # the first token has nothing before it
        return [[row[token].logprob for token in range(vocabulary)] for row in rows]

    results: dict[str, object] = {"": {"logprobs": answer(None)}}
    for number, (name, folder) in enumerate(request["adapters"].items(), 1):
        adapter = LoRARequest(name, number, folder)
        try:
            engine.llm_engine.add_lora(adapter)
        except Exception as error:
            results[name] = {"error": str(error)}
        else:
            results[name] = {"logprobs": answer(adapter)}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
