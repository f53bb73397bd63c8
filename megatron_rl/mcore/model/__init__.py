"""Megatron-Core GPT model: configuration, layers, attention, log-probabilities."""
