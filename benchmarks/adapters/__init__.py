"""`make bench-adapters`: what LoRA adapters merged into one keep, and what that costs."""
