"""Choosing chunks without a sort, and what a change of the resident set takes."""
