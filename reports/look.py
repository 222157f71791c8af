"""How a report is published: file formats, the width of figures, names of methods, and which methods are shown.

The look of the moment is held while a report is made (`wearing`), so that what draws a line need not be handed it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from kvscope.errors import UsageError, did_you_mean, shown

FORMATS = ("png", "svg", "pdf")
Style = Literal["screen", "paper"]
STYLES: tuple[Style, ...] = ("screen", "paper")
NARROWEST_IN, WIDEST_IN = 2.0, 20.0
_INCHES = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the figures and tables of a report look like.

    Attributes:
        formats: endings of the files of a figure, beside the CSV.
        width_in: width of every figure, inches; None: what its panels need.
        titled: whether figures have their title and what stands below it; captions hold the same.
        style: ``paper`` has smaller type and no remarks below the panels.
        methods: labels that are shown; none: all.
        names: label -> what figures and tables call it.
    """

    formats: tuple[str, ...] = ("png", "svg")
    width_in: float | None = None
    titled: bool = True
    style: Style = "screen"
    methods: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_print(self) -> bool:
        """Whether figures go to print: more dots an inch, and names in a key where there is no room beside lines."""
        return self.style == "paper" or self.width_in is not None or not self.titled or "pdf" in self.formats

    @property
    def keyed(self) -> bool:
        """Whether lines and points are named in a key above them: beside them a narrow figure has no room."""
        return self.width_in is not None

    def pt(self, size: float) -> float:
        """Size of type in points: of the paper's style six sevenths of the screen's, and 6 at least."""
        return max(6.0, size * 6 / 7) if self.style == "paper" else size


_SCREEN = Look()
_worn: ContextVar[Look] = ContextVar("look", default=_SCREEN)


def look() -> Look:
    """Return the look of the moment."""
    return _worn.get()


@contextmanager
def wearing(chosen: Look) -> Iterator[None]:
    """Hold a look while a report is made."""
    token = _worn.set(chosen)
    try:
        yield
    finally:
        _worn.reset(token)


def make_look(
    *,
    formats: str | None = None,
    width: str | None = None,
    titled: bool = True,
    methods: str | None = None,
    names: Sequence[str] = (),
    style: str = "screen",
) -> Look:
    """Read a look as a command takes it; labels are compared with a run by ``fitted``.

    Args:
        formats: as ``pdf,svg``.
        width: as ``3.3in`` (in, cm, mm, pt).
        methods: labels with commas; where a label has commas of its own, ``fitted`` puts it together.
        names: as ``LABEL=NAME``.

    Raises:
        UsageError: one of them is none.
    """
    chosen = tuple(dict.fromkeys(part.strip().lower() for part in formats.split(","))) if formats is not None else ()
    for ending in chosen:
        if ending not in FORMATS:
            near = did_you_mean(ending, FORMATS) or f" Write {', '.join(FORMATS)}."
            raise UsageError(f"--format: {shown(ending)} is no format of a figure.{near}")
    kind: Style | None = next((known for known in STYLES if known == style), None)
    if kind is None:
        raise UsageError(f"--style: {shown(style)} is no style: write {' or '.join(STYLES)}.")
    for text in names:
        if "=" not in text.strip("="):
            raise UsageError(f"--label: {shown(text)} names nothing: write LABEL=NAME, as recency=Recency.")
    return Look(
        formats=chosen or Look.formats,
        width_in=None if width is None else _inches(width),
        titled=titled,
        style=kind,
        methods=() if methods is None else (methods,),
        names=dict.fromkeys(names, ""),
    )


def fitted(chosen: Look, labels: Sequence[str], *, where: str) -> Look:
    """Return a look whose labels are those of a run.

    Args:
        chosen: of ``make_look``.
        labels: the run's.
        where: the run, as a message names it.

    Raises:
        UsageError: a label that the run does not have, or two methods of one name.
    """
    names = {}
    for text in chosen.names:
        # A label has signs of equality of its own: the longest one that fits is meant.
        found = max((label for label in labels if text.startswith(f"{label}=")), key=len, default=None)
        if found is None:
            near = did_you_mean(text.rpartition("=")[0], labels)
            raise UsageError(f"--label: {where} has no method that {shown(text)} names.{near}")
        if found in names:
            raise UsageError(f"--label names {shown(found)} twice: keep one.")
        names[found] = " ".join(text.removeprefix(f"{found}=").split())
        if not names[found]:
            raise UsageError(f"--label: {shown(text)} gives no name.")
    given = [names.get(label, label) for label in labels]
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"--label: two methods would be called {shown(name)}.")
    methods = _labels(chosen.methods[0], labels, where) if chosen.methods else ()
    return Look(
        formats=chosen.formats,
        width_in=chosen.width_in,
        titled=chosen.titled,
        style=chosen.style,
        methods=tuple(label for label in labels if label in methods),
        names=names,
    )


def _labels(text: str, labels: Sequence[str], where: str) -> list[str]:
    """Labels out of a list with commas; the longest label that fits is meant, for labels have commas, too."""
    found, rest = [], text.strip()
    while rest:
        fitting = [label for label in labels if rest == label or rest.startswith(f"{label},")]
        if not fitting:
            name = rest.split(",")[0]
            raise UsageError(f"--methods: {where} has no method {shown(name)}.{did_you_mean(name, labels)}")
        found.append(max(fitting, key=len))
        rest = rest.removeprefix(found[-1]).removeprefix(",").strip()
    if not found:
        raise UsageError("--methods names none: write labels with commas, as dense,lsa.")
    return found


def _inches(text: str) -> float:
    from kvscope.units import finite_number

    for unit, size_in in _INCHES.items():
        number = finite_number(text.strip().lower().removesuffix(unit)) if text.strip().lower().endswith(unit) else None
        if number is not None and NARROWEST_IN <= number * size_in <= WIDEST_IN:
            return number * size_in
    raise UsageError(
        f"--width: {shown(text)} is no width: write 3.3in, 84mm or 240pt, {NARROWEST_IN:g} to {WIDEST_IN:g} inches."
    )
