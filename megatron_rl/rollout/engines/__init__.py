"""Inference engines: their protocol, one file for each engine, and what the engines share."""
