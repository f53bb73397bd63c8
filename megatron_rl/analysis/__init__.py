"""What a run taught: reports from its files."""
