"""Dense: the whole cache resident, the whole cache read."""
