"""The LLM suite: SmolLM2-135M, fine-tuned on short text tasks by LoRA, merged, judged by lm-eval.

python -m benchmarks.llm  # `make bench-llm`
"""
