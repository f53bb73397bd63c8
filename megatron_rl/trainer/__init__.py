"""Training loops and their parts. Read loop.py first."""
