"""The contenders of tools/bench_step.py, each a process of its own, and what they share."""
