"""Pure functions of reinforcement learning: they see whole sequences and know no ranks."""
