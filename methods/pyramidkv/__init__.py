"""PyramidKV: SnapKV's choice, with more tokens in the first layers than in the last."""
