"""Model weights as slices of Hugging Face tensors: one layout table for loading, exporting and resharding."""
