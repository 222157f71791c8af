"""Which modules of a run the nodes of a cluster do not have: those of methods and tasks that are asked for by path."""

import importlib.util
import sysconfig
from pathlib import Path

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig


def modules_to_ship(config: RunConfig) -> list[str]:
    """Return the file or folder of each top-level module that methods and tasks are named in, once each.

    An installed package is not among them: nodes have it as they have kvscope.

    Raises:
        UsageError: a module is neither.
    """
    found: dict[str, None] = {}
    for spec in (*config.methods, *config.tasks):
        if ":" not in spec.name:
            continue
        name = spec.name.partition(":")[0].partition(".")[0]
        where = _place(name)
        if where is None:
            raise UsageError(
                f"Module {name!r} cannot be sent to the nodes of the cluster: it is no file and no folder. Install it "
                "on every node as a package."
            )
        if not _is_installed(where):
            found[str(where)] = None
    return list(found)


def _place(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).absolute()
    return Path(spec.origin).absolute() if spec.origin and spec.origin.endswith(".py") else None


def _is_installed(where: Path) -> bool:
    folders = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
    return any(where.resolve().is_relative_to(folder) for folder in folders)
