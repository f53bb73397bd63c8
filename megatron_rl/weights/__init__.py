"""Weights as slices of Hugging Face tensors: one table for loading, exporting and resharding."""
