"""Readers: attention over what a cache keeps, and Flax modules around it."""
