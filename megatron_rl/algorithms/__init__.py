"""Pure functions of reinforcement learning; they take whole sequences and do not depend on ranks."""
