"""Collecting, training and evaluating the indexers that methods choose with."""
