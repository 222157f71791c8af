"""H2O: heavy hitters of all attention so far, and the most recent tokens."""
