"""Makes the fixtures of the tiny saved model available here, too."""

from tiny import one_thread, small, tiny_model

__all__ = ["one_thread", "small", "tiny_model"]
