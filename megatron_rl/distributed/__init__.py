"""Collectives, heartbeat and signals of the ranks."""
