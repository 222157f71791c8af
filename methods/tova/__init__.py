"""TOVA: at every step the token that the last one attends to least leaves."""
