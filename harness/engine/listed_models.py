"""transformers' list of its own models, read once: a tenth of all that a start imports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def models_listed_once() -> Iterator[None]:
    """Within it, ``transformers.models`` takes the list that ``transformers`` has made of the same files.

    As it is imported, transformers reads every file of its models for the names in it, and once more as
    ``transformers.models`` is: what it keeps in between (5.17) are the last 128 of over a thousand folders.
    """
    import transformers
    from transformers.utils import import_utils

    models = Path(transformers.__file__).parent / "models"
    listed_from = import_utils.create_import_structure_from_path

    def listed(path: Any) -> Any:
        return listed_from(models if str(path) == str(models / "__init__.py") else path)

    import_utils.create_import_structure_from_path = listed
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = listed_from
