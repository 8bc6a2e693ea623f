"""A frozen function's outputs, kept per item in memory and on disk, and found again by the item's content."""
