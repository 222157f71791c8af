"""Tables, figures and the self-contained HTML page made from a run."""

from pathlib import Path


def make_report(folder: str | Path) -> list[Path]:
    """Write `<folder>/report/`: tables, figures and `report.html`; returns the paths written.

    Works on an unfinished run and says what is missing. The same rows give the same files. Files that no report wrote
    stay as they are.

    Raises:
        UsageError: the folder holds no run or a corrupt one, or `report` in it is a link or a file.
        EnvironmentProblem: the disk is full, or the folder cannot be written; the report before is kept.
    """
    from kvscope.reports.build import build_report

    return build_report(folder)


__all__ = ["make_report"]
