"""Evaluation tasks with exact lengths, evidence spans and prompt hashes."""
