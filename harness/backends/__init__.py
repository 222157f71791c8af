"""Kinds of cache beside pages of K and V, one folder each."""
