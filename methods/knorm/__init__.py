"""Key norm: the tokens of the smallest keys."""
