"""SnapKV: the tokens that the end of the prompt attends to."""
