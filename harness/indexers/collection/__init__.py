"""Prompts collected once for training: hidden states, labels and shards on disk."""
