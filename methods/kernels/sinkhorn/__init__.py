"""Doubly stochastic mixing of DeepSeek-V4's residual streams."""
