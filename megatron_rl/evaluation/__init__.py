"""Benchmarks: tasks, answers, verdicts, reports. Never imports Megatron-Core."""
