"""Benchmarks: questions, generation, grading, results and reports. Never imports Megatron-Core."""
