"""Checkpoints of a run: save, restore, verify, export."""
