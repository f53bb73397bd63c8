"""Plots, statistics and HTML pages of runs and studies."""
