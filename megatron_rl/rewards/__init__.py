"""Reward functions, which map a response to a number, and the worker processes that run them."""
