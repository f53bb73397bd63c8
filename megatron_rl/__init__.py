"""Reinforcement learning of large language models on Megatron-Core, without Ray."""

__version__ = "0.1.0"
