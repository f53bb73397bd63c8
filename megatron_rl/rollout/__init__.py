"""Rollouts: inference engines, and the sources that provide the rollout groups of a step."""
