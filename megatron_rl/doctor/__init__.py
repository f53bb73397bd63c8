"""Check machines for faults before a run starts."""
