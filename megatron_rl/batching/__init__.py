"""From graded rollouts to the micro-batches of every rank."""
