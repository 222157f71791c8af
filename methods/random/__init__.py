"""Random: the recency window and chunks drawn at random."""
