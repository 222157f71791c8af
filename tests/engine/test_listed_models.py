"""transformers' list of its models, read once: it is the list that a second reading gives."""

from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from kvscope.harness.engine.listed_models import models_listed_once

MODELS = Path(transformers.__file__).parent / "models"


def test_the_list_is_that_of_a_second_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read = import_utils.create_import_structure_from_path
    lists = import_utils.define_import_structure.__wrapped__
    read.cache_clear()
    read(MODELS)  # as ``import transformers`` does
    opened: list[str] = []

    def opening(file: str, *arguments: object, **options: object) -> object:
        opened.append(file)
        return open(file, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(import_utils, "open", opening, raising=False)
    with models_listed_once():
        found = lists(str(MODELS / "__init__.py"))
        part = lists(str(MODELS / "llama" / "__init__.py"))
    assert not [file for file in opened if Path(file).parent.name != "llama"]
    opened.clear()
    assert found == lists(str(MODELS / "__init__.py"))
    assert len(opened) > 500, "a second reading opens the files of all models"
    assert "modeling_llama" in part[frozenset({"torch"})]


def test_transformers_is_as_before_afterwards() -> None:
    read = import_utils.create_import_structure_from_path
    with pytest.raises(IndexError), models_listed_once():
        [].pop()
    assert import_utils.create_import_structure_from_path is read
