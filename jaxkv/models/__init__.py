"""Models that decode with a cache."""
