"""The contenders of tools/bench/step.py, each of which is a separate process, and their shared code."""
