"""The contenders of tools/bench/step.py, each a process of its own, and what they share."""
