"""Rollouts: engines that sample, and the sampler that collects and grades groups."""
