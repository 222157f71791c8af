"""Runs models: loading, prefill, decode, memory, the sweep and its workers."""
