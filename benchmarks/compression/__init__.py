"""Fine-tuned models as a base and adapters: accuracy, bytes and cost."""
