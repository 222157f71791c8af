"""GGUF files: transformers unpacks one into plain float32 weights, once; they lie in the user's cache as a folder.

From there on it is a model folder like any other: plans, workers and identities read it as they read all others. The
folder is named after the file's SHA-256, transformers' version, which decides how weights are unpacked, and a number
that grows when kvscope unpacks otherwise.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.files import first_line
from kvscope.harness.engine.file_hashes import file_sha256s
from kvscope.harness.engine.gguf_tokenizer import Vocabulary, check, mended
from kvscope.harness.engine.oom import is_oom
from kvscope.paths import cache_folder

ENDING = ".gguf"
_MAGIC = b"GGUF"
_LABEL_FILE = "kvscope_label.txt"
#: 1: tokenizers as transformers reads them. 2: held against the file. 3: control tokens whole, spaces before texts.
_UNPACKING = 3


def gguf_in(given: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the one in a folder without a config.json.

    Raises:
        UsageError: a folder holds several.
    """
    if given.is_file():
        return given if given.suffix == ENDING else None
    if not given.is_dir() or (given / "config.json").is_file():
        return None
    found = sorted(given.glob(f"*{ENDING}"))
    if len(found) > 1:
        raise UsageError(f"Model folder '{given}' holds {len(found)} GGUF files: give --model one, as {found[0].name}.")
    return found[0] if found else None


def unpacked(path: Path) -> tuple[str, str]:
    """Return the folder that a GGUF file was unpacked into, and what rows call it: its name, kind of weights, unpacked.

    Raises:
        UsageError: it is none, damaged or cut off, or of a model or with weights that transformers does not unpack;
            the package gguf is missing; the cache cannot be written.
    """
    import transformers

    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        digest = file_sha256s([path])[0]
    except OSError as error:
        raise UsageError(f"The GGUF file '{path}' cannot be read ({error.strerror}).") from error
    if magic != _MAGIC:
        raise UsageError(f"The GGUF file '{path}' is none, it does not begin with 'GGUF': fetch it again.")
    folder = cache_folder() / "gguf" / f"{digest[:16]}-transformers-{transformers.__version__}-{_UNPACKING}"
    if not (folder / _LABEL_FILE).is_file():
        if find_spec("gguf") is None:
            raise UsageError(
                f"The GGUF file '{path}' needs the package gguf to be unpacked: pip install 'kvscope[gguf]'."
            )
        with _header_read_once():
            kind = _checked(path)
            _unpack(path, folder, f"{path.stem} (GGUF {kind}, unpacked)")
    return str(folder), (folder / _LABEL_FILE).read_text(encoding="utf-8")


@contextlib.contextmanager
def _header_read_once() -> Iterator[None]:
    """Within it a file's header is read once for all who ask: config, weights and tokenizer each do.

    A header with the 262,144 tokens of Gemma takes most of the time of unpacking 270M weights.
    """
    import gguf

    module: Any = gguf
    own: Any = module.GGUFReader
    readers: dict[str, Any] = {}

    def reader(path: Any, *arguments: Any, **options: Any) -> Any:
        key = os.fspath(path)
        if arguments or options:
            return own(path, *arguments, **options)
        if key not in readers:
            readers[key] = own(path)
        return readers[key]

    module.GGUFReader = reader
    try:
        yield
    finally:
        module.GGUFReader = own


def _checked(path: Path) -> str:
    """Return the kind of weights that most of a file is, of files whose tensors are all there."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max((int(each.data_offset) + int(each.n_bytes) for each in reader.tensors), default=0)
        if not reader.tensors or end > path.stat().st_size:
            raise ValueError("tensors end behind the file's end")
        sizes: dict[str, int] = {}
        for each in reader.tensors:
            sizes[each.tensor_type.name] = sizes.get(each.tensor_type.name, 0) + int(each.n_bytes)
        field = reader.get_field("general.file_type")
        if field is not None:
            with contextlib.suppress(ValueError):
                return str(gguf.LlamaFileType(int(field.contents())).name).removeprefix("MOSTLY_")
        return max(sizes, key=lambda name: sizes[name])
    except Exception as error:
        if is_oom(error):
            raise
        raise UsageError(
            f"The GGUF file '{path}' is cut off or damaged ({first_line(error)}): fetch it again."
        ) from error


def _unpack(path: Path, folder: Path, label: str) -> None:
    import torch
    import transformers

    # From 5.23 on transformers keeps some models' weights packed unless told; before, it always unpacks.
    config: Any = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
        where = str(path.parent)
        vocabulary = Vocabulary.of(path)
        with contextlib.redirect_stderr(io.StringIO()):  # bars of transformers and of tqdm
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, **options
            )
            model.save_pretrained(partial)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=path.name, trust_remote_code=False)
            if vocabulary is not None:
                tokenizer = mended(tokenizer, vocabulary)
            tokenizer.save_pretrained(partial)
            if vocabulary is not None:  # a saved tokenizer is made anew by its class, and may come back as another
                check(transformers.AutoTokenizer.from_pretrained(str(partial), trust_remote_code=False), vocabulary)
        (partial / _LABEL_FILE).write_text(label, encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first: its folder says the same
            partial.rename(folder)
        if not (folder / _LABEL_FILE).is_file():
            raise OSError(f"'{folder}' cannot be made")
    except UsageError:
        raise
    except Exception as error:
        if is_oom(error):
            raise
        raise UsageError(
            f"The GGUF file '{path}' cannot be unpacked into '{folder.parent}': {first_line(error)}."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
