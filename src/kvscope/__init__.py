"""kvscope: accuracy, physical memory and speed of KV-cache methods, measured side by side.

``import kvscope`` stays light: torch and pandas load when a name below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvscope.harness.passes.config import RunConfig
    from kvscope.harness.passes.sweep import run
    from kvscope.results.frames import Run, load_run

__version__ = "0.2.0"
__all__ = ["Run", "RunConfig", "__version__", "load_run", "run"]

_HOMES = {
    "Run": "kvscope.results.frames",
    "RunConfig": "kvscope.harness.passes.config",
    "load_run": "kvscope.results.frames",
    "run": "kvscope.harness.passes.sweep",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvscope' has no attribute {name!r}")
