"""Decode attention of one query a sequence over pages, read through a page table."""
