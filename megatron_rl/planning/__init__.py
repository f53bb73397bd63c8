"""Estimate whether a run fits in memory and how long a step takes, before it starts."""
