"""Analysis of the responses that a run or an evaluation recorded."""
