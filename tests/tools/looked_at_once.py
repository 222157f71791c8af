"""What every run of a model looks at anew, looked at once by all tests of a process: most of them run the same few."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def models_looked_at_once() -> Iterator[None]:
    """Read a folder's tokenizer once, and try the attention of a configuration once; refusals are made every time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _read_tokenizers_once(monkeypatch)
        _try_attention_once(monkeypatch)
        yield


def _read_tokenizers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the tokenizer of a folder whose files are those that it was read from: 5 times as fast as to read it.

    What kvscope loads shares the part in Rust, which nothing of it changes, and which takes nearly all of a copy.
    """
    from transformers import AutoTokenizer

    from kvscope.harness.engine import loading

    read = AutoTokenizer.from_pretrained
    known: dict[tuple[Any, ...], Any] = {}

    def tokenizer_of(where: Any, *arguments: Any, **options: Any) -> Any:
        folder = Path(where)
        if arguments or not folder.is_dir():
            return read(where, *arguments, **options)
        found = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        files = tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)
        key = (str(where), files, *sorted(options.items()))
        if key not in known:
            known[key] = read(where, **options)
        rust = getattr(known[key], "backend_tokenizer", None)
        asks = sys._getframe(1).f_globals["__name__"]
        return copy.deepcopy(known[key], {id(rust): rust} if rust is not None and asks == loading.__name__ else None)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer_of)


def _try_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a token through a model without storage where none of its kind and configuration has passed before."""
    from kvscope.harness.backends.paged import backend
    from kvscope.harness.engine.rotation import try_attention

    passed: set[tuple[Any, ...]] = set()

    def tried(model: Any, shape: Any) -> None:
        key = (type(model), model.config.to_json_string(), repr(shape))
        if key not in passed:
            try_attention(model, shape)
            passed.add(key)

    monkeypatch.setattr(backend, "try_attention", tried)
