"""Recency: the end of the prompt and what is decoded."""
