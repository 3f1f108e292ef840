"""`make bench-adapters`: what it costs to merge LoRA adapters into one."""
