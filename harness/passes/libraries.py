"""The libraries that every measurement needs, imported at once."""

from kvscope.plugins import importing


def import_libraries() -> None:
    """Import torch, transformers and what of kvscope needs them."""
    with importing():
        import kvscope.harness.engine.decode
        import kvscope.harness.engine.models
        import kvscope.harness.engine.prefill  # noqa: F401
