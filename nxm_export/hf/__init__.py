"""Hugging Face models: the one place of this package that knows torch and transformers."""
