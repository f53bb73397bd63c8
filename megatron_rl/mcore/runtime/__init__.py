"""Process groups, and Megatron-Core on CPUs."""
