"""Metrics: typed values, reduced once a step, written to several sinks."""
