"""Methods and tasks from outside the tree: by entry point, or by import path.

An installed package names them under the groups ``kvscope.methods`` and ``kvscope.tasks``. Nothing of a package is
imported before its name is used.
"""

import gc
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from kvscope.errors import KvscopeError, UsageError, did_you_mean, shown
from kvscope.specs import NAME_PATTERN, PLACE_PATTERN, Kind

OWN = "kvscope"


@dataclass(frozen=True)
class Place:
    """Where a method or task comes from.

    Attributes:
        kind: which of the two.
        name: what it is asked for by: a registered name or an import path.
        target: ``package.module:Class``.
        origin: the installed package that brings it; None for an import path.
    """

    kind: Kind
    name: str
    target: str
    origin: str | None

    @property
    def is_own(self) -> bool:
        """Whether it is kvscope's own."""
        return self.origin == OWN

    def __str__(self) -> str:
        return f"{self.target} of {self.origin}" if self.origin else self.target


#: Modules that an import brings where it is worth settling the collector behind it.
MANY_MODULES = 100


@contextmanager
def importing() -> Iterator[None]:
    """Hold the collector still while large packages are imported: modules are no garbage.

    Looking through them again and again takes a fifth of the imports, and a tenth of a second when it goes on. So all
    that is there by then counts as old: only a full collection looks at it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    n_modules = len(sys.modules)
    try:
        yield
    finally:
        # To count what is frozen, Python walks through all of it: not for a package that was there already. Where
        # someone has frozen something, unfreezing would undo that.
        if len(sys.modules) - n_modules >= MANY_MODULES and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@cache
def installed(kind: Kind) -> tuple[Place, ...]:
    """Return every entry point of a kind, sorted; an installation found twice on the path counts once."""
    found = {
        Place(kind, point.name, point.value.partition("[")[0].strip(), point.dist.name if point.dist else "?")
        for point in entry_points(group=f"kvscope.{kind}s")
    }
    return tuple(sorted(found, key=lambda place: (place.name, str(place))))


def names(kind: Kind, own: Mapping[str, str]) -> list[str]:
    """Return kvscope's own names in their order, then those of installed packages, each once."""
    return list(dict.fromkeys([*own, *(place.name for place in installed(kind))]))


def find(kind: Kind, name: str, own: Mapping[str, str]) -> Place:
    """Return where a name or an import path leads.

    Raises:
        UsageError: nothing has that name, or two have it.
    """
    if ":" in name:
        module = name.partition(":")[0]
        if module in own:
            raise UsageError(f"{shown(name)}: {module!r} is a {kind}, so write {module}:key=value.")
        return Place(kind, name, name, None)
    places = [Place(kind, name, own[name], OWN)] if name in own else []
    places += [place for place in installed(kind) if place.name == name]
    if not places:
        raise UsageError(f"There is no {kind} {shown(name)}.{did_you_mean(name, names(kind, own))}")
    if len(places) > 1:
        raise UsageError(
            f"Two packages bring a {kind} {name!r}: {' and '.join(map(str, places))}. Uninstall one, or write "
            f"{places[-1].target}."
        )
    return places[0]


def load(place: Place) -> object:
    """Import what a place names.

    Raises:
        UsageError: the module is missing or raises, or has no such attribute.
    """
    match = PLACE_PATTERN.fullmatch(place.target)
    if match is None:
        raise broken(place, f"{shown(place.target)} is not package.module:Class")
    module_name, attribute = match[1], match[2]
    if place.origin is None and not _exists(module_name.partition(".")[0]):
        raise broken(place, f"no module {module_name.partition('.')[0]!r} is installed or on PYTHONPATH")
    try:
        with importing():
            module = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise broken(place, f"importing {module_name} raised {type(error).__name__}: {_one_line(error)}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = did_you_mean(attribute, [key for key in vars(module) if not key.startswith("_")])
        raise broken(place, f"module {module_name} has no {attribute!r}", near) from None


def _exists(module_name: str) -> bool:
    try:
        return module_name in sys.modules or importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):
        return False


def broken(place: Place, why: str, hint: str = "") -> UsageError:
    """Return the error of a plug-in that cannot be used."""
    where = f" ({place})" if place.origin else ""
    return UsageError(f"{place.kind.capitalize()} {place.name!r}{where} cannot be used: {why}.{hint}")


def is_own_class(cls: type) -> bool:
    """Whether a class is kvscope's own."""
    return cls.__module__.partition(".")[0] == OWN


@contextmanager
def asking(kind: Kind, name: str, cls: type, what: str) -> Iterator[None]:
    """Say in one sentence what a class from outside raises, and where; what kvscope's own raises stays as it is.

    Args:
        what: is asked, as the subject of the sentence (``its build``).

    Raises:
        UsageError: it raised what is no error of kvscope's.
    """
    try:
        yield
    except (KvscopeError, MemoryError):
        raise
    except Exception as error:
        if is_own_class(cls):
            raise
        raised = f"{type(error).__name__}: {_one_line(error)}{_last_place(error, cls)}"
        raise UsageError(f"{kind.capitalize()} {name!r} cannot be used: {what} raised {raised}.") from error


def _last_place(error: Exception, cls: type) -> str:
    """Return the last line of the class's package that an error went through; empty where it is in none."""
    package = cls.__module__.partition(".")[0]
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package and file.suffix == ".py":
            found = f" ({file.name}, line {line})"
    return found


def check_class(place: Place, found: object, *, base: type, own: Mapping[str, str]) -> None:
    """Check that a class from outside derives from ``base``, defines all that is left open there, and is named.

    Raises:
        UsageError: naming the first thing it lacks.
    """
    if not (isinstance(found, type) and issubclass(found, base)):
        raise broken(place, f"it is not a subclass of {base.__module__}.{base.__qualname__}")
    if undefined := getattr(found, "__abstractmethods__", ()):
        raise broken(place, f"it does not define {', '.join(sorted(undefined))}")
    check_name(place, getattr(found, "name", None), own)


def check_name(place: Place, name: object, own: Mapping[str, str]) -> None:
    """Check the ``name`` of a class from outside: rows carry it, so it must be one, and no other's.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise broken(place, f"its class has the name {shown(name)}, expected letters, digits, '_', '-' and '.'")
    if name in own:
        raise broken(place, f"its class has the name {name!r}, which is kvscope's own")
    if place.origin is not None and name != place.name:
        raise broken(place, f"its class has the name {name!r}: entry point and class must agree")


def search_path() -> tuple[str, ...]:
    """Return the folders this process imports from, for another process to search behind its own."""
    return tuple(str(Path(entry).absolute()) for entry in sys.path)


def extend_search_path(folders: tuple[str, ...]) -> None:
    """Search these folders too, behind all others: nothing in them can stand in for an installed module."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    installed.cache_clear()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return shown(text)[1:-1]
