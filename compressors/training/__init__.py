"""Fine-tuning and compression: the phases, the trainer, and what they learn from."""
