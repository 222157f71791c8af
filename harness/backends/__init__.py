"""Kinds of KV cache, a folder each. The table of which model has which, and the contract, are in engine/backend.py."""
