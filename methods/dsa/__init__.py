"""DSA: tokens chosen one by one, one set for all heads."""
