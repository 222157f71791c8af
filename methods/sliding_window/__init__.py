"""Sliding window (StreamingLLM): attention sinks and the last W tokens."""
