"""The small files of a model's folder, before transformers reads them: regular files, JSON where they are called so.

transformers passes over a link to nothing, a folder or a pipe, and would run another model than the folder's: one
without its end tokens, its BOS or its chat template.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvscope.harness.engine.identity import TOKENIZER_FILES

_GENERATION = "generation_config.json"
_SMALL_FILES = (_GENERATION, "chat_template.jinja", "chat_template.json", *TOKENIZER_FILES)
_READ_LATER = "tokenizer.json"
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def check_small_files(folder: Path) -> None:
    """Check the files beside the weights, but for what the config says.

    Raises:
        ValueError: one is no regular file or no JSON object, or names end tokens that are none.
        OSError: one cannot be read.
    """
    for name in _SMALL_FILES:
        path = folder / name
        if is_there(path) and name.endswith(".json") and name != _READ_LATER:
            found = json_object(path)
            if name == _GENERATION:
                _check_eos_ids(found)
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        is_there(path)


def check_tokenizer_files(folder: Path) -> None:
    """Check that there is a tokenizer.

    Raises:
        ValueError: no file of one is there, or one is empty of it.
    """
    if not any(path for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern)):
        raise ValueError("the folder has no tokenizer.json nor other tokenizer files")
    path = folder / _READ_LATER
    if is_there(path) and not isinstance(json_object(path).get("model"), dict):
        raise ValueError(f"{path.name} holds no tokenizer (no 'model' in it)")


def is_there(path: Path) -> bool:
    """Return whether there is a file of this name.

    Raises:
        ValueError: what has the name is no regular file.
    """
    if path.is_file():
        return True
    if not os.path.lexists(path):
        return False
    what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no regular file"
    raise ValueError(f"{path.name} is {what}")


def json_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, which must be an object.

    Raises:
        ValueError: naming the file.
        OSError: it cannot be read.
    """
    try:
        # Not as bytes: json would guess other encodings, transformers reads UTF-8.
        found = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def _check_eos_ids(values: Mapping[str, Any]) -> None:
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"eos_token_id in {_GENERATION} is {given!r}, and must be a token id or a list of them")
