"""The libraries that every measurement needs, imported at once."""

import gc


def import_libraries() -> None:
    """Import torch, transformers and what of kvscope needs them, with garbage collection off.

    Modules are no garbage, and a collector that looks through them again and again costs a fifth of the imports.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import kvscope.harness.engine.decode
        import kvscope.harness.engine.models
        import kvscope.harness.engine.prefill  # noqa: F401
    finally:
        if collecting:
            gc.enable()
