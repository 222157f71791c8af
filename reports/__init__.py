"""Tables, figures and the self-contained HTML page made from a run."""

from pathlib import Path


def make_report(folder: str | Path) -> list[Path]:
    """Write `<folder>/report/`: tables, figures and `report.html`; returns the paths written.

    Works on an unfinished run and says what is missing. The same rows give the same files.
    Raises UsageError when the folder holds no run, holds a corrupt one, or cannot be written.
    """
    from kvscope.reports.build import build_report

    return build_report(folder)


__all__ = ["make_report"]
