"""Scores of blocks of keys for one query: Quest's bound, MoBA's mean, MSA's best key."""
