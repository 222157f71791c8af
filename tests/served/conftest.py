"""The faulty server is a fixture of this room's tests."""

from stub_server import stub

__all__ = ["stub"]
