"""Scores of every chunk from one hidden state: fp8 keys, many indexer heads."""
