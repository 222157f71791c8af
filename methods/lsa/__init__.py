"""Lookahead Sparse Attention: predicted chunks on the device, everything else in the host mirror."""
