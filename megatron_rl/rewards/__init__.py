"""Rewards: functions from a response to a number, run in worker processes."""
