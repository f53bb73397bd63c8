"""Process groups, patches of Megatron-Core, and Megatron-Core on CPUs."""
