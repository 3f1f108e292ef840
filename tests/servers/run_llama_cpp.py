"""llama.cpp: converters and run time, with adapters. Run by `servers.run`."""

from __future__ import annotations

import io
import json
import logging
import random
import runpy
import sys
from pathlib import Path

import sentencepiece
import xllamacpp


def main() -> None:
    """Answer the request of the file named first in the file named second."""
    request = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    base = Path(request["base"])
    sys.path.insert(0, request["converters"])
    _write_tokenizer(base / "tokenizer.model", request["vocabulary"])
    model, error = _convert(request["converters"], "convert_hf_to_gguf.py", [base], out, "base")
    if error:
        sys.exit(f"llama.cpp cannot convert {base}: {error}")
    results: dict[str, object] = {"": {"logprobs": _answers(model, None, request)}}
    for name, folder in request["adapters"].items():
        arguments = [folder, "--base", base]
        adapter, error = _convert(
            request["converters"], "convert_lora_to_gguf.py", arguments, out, name
        )
        results[name] = (
            {"error": error} if error else {"logprobs": _answers(model, adapter, request)}
        )
    out.write_text(json.dumps(results))


def _convert(
    converters: str, script: str, arguments: list[object], out: Path, name: str
) -> tuple[Path, str]:
    """The GGUF file in fp32, and what the converter says where it fails.

    The script runs as its command line does, but in this process: starting takes far longer.
    """
    written = out.with_name(f"{name}.gguf")
    options = ["--outtype", "f32", "--outfile", str(written)]
    sys.argv = [script, *map(str, arguments), *options]
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        runpy.run_path(f"{converters}/{script}", run_name="__main__")
    except (Exception, SystemExit) as error:
        if not (isinstance(error, SystemExit) and not error.code):
            return written, f"{said.getvalue()[-500:]}{type(error).__name__}: {error}"
    finally:
        logging.getLogger().removeHandler(handler)
    return written, ""


def _answers(model: Path, adapter: Path | None, request: dict) -> list[list[float]]:
    """Log probabilities of all tokens after each beginning of the prompt but the whole of it."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = 1
    # fp32 throughout: by default keys and values are rounded to fp16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    rows = []
    for count in range(1, len(request["prompt"])):
        found = server.handle_completions(
            {
                "prompt": request["prompt"][:count],
                "max_tokens": 1,
                "logprobs": request["vocabulary"],
                "temperature": -1,  # of all tokens, and not of those that sampling leaves
                "cache_prompt": False,
            }
        )
        (token,) = found["choices"][0]["logprobs"]["content"]
        by_token = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
        rows.append([by_token[token] for token in range(request["vocabulary"])])
    return rows


def _write_tokenizer(path: Path, vocabulary: int) -> None:
    """Some tokenizer of the size: converters want one, prompts here are numbers."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(2, 7))) for _ in range(400)]
    lines = [" ".join(letters.choices(words, k=8)) for _ in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=vocabulary,
        model_type="bpe",
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())


if __name__ == "__main__":
    main()
