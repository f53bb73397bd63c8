"""Hugging Face folders to Megatron checkpoints and back: streamed, in parallel, whole or not at all."""
