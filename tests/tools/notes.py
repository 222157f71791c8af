"""A progress that keeps what a user would be told."""

from kvscope.harness.passes.progress import Progress


class Notes(Progress):
    """Keeps notes and the summaries of cells."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.cells: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def end_cell(self, summary: str, *, cell: str | None = None) -> None:
        self.cells.append(summary)
