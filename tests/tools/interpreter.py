"""Triton's interpreter, with what it does at every call done once a launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def language_patched_once_a_launch() -> Iterator[None]:
    """Let the interpreter replace the functions of ``triton.language`` at the first call of a launch alone.

    It does so at every call of a helper, too, which changes nothing and takes two fifths of an interpreted kernel's
    time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    def patch_once(fn: Any) -> Any:
        seen = {module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
        if seen <= patched:
            return None  # helpers do not ask
        patched.update(seen)
        return patch(fn)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
