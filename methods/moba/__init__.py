"""MoBA: blocks chosen by the mean of their keys."""
