"""State: what a cache keeps, where it lies and who may see it. Imports jax and numpy only."""
