"""Files of the query side of an indexer over compressed entries: safetensors, or the released checkpoint.

Tensors of safetensors files are named ``layers.<index>.<matrix>.weight``, whatever stands before or in between. The
matrices are called as the paper writes them, ``W_DQ`` [R, M], ``norm`` [R], ``W_IUQ`` [I * E, R], ``W_w`` [I, M], or as
DeepSeek's own indexers call the like: ``wq_a``, ``q_norm``, ``wq_b``, ``weights_proj``.

The released checkpoint (repository libertywing/FlashMemory-Deepseek-V4), ``.pt`` or ``.safetensors``, has
``retrievers.l<ordinal>.`` before ``wq_a.weight``, ``q_norm_weight``, ``wq_b.weight`` and ``weights_proj.weight``. The
ordinal counts the compressed-sparse (CSA) layers from 0: 10, 12 and 20 are layers 22, 26 and 42 of DeepSeek-V4-Flash.
Its table of rotations (``freqs_cis``) is not read: the model has it.
"""

import hashlib
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch

from kvscope.errors import UsageError, shown
from kvscope.methods.indexer_weights import cannot_read, finite_weights, tensor_headers
from kvscope.methods.lsa.compressed import CompressedIndexer
from kvscope.methods.lsa.compressed_query import QueryWeights
from kvscope.paths import user_path

MATRICES = ("W_DQ", "norm", "W_IUQ", "W_w")
_SPELLINGS = {"wq_a": "W_DQ", "q_norm": "norm", "wq_b": "W_IUQ", "weights_proj": "W_w"}
_RELEASED_SPELLINGS = {
    "wq_a.weight": "W_DQ", "q_norm_weight": "norm", "wq_b.weight": "W_IUQ", "weights_proj.weight": "W_w",
}  # fmt: skip
_NAME = re.compile(r"(?:.+\.)?layers\.(\d{1,9})\.(?:.+\.)?(\w+)\.weight")
_RELEASED_NAME = re.compile(r"retrievers\.l(\d{1,9})\.(.+)")
_ROTATIONS = re.compile(r"(?:retrievers\.l\d+\.)?freqs_cis")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What torch.load raises where a file is cut off, of another format, or holds more than tensors.
_LOAD_ERRORS = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError, TypeError,
    UnpicklingError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def load_compressed_indexer(path: str | Path, *, csa_layers: Sequence[int]) -> CompressedIndexer:
    """Load the query side of an indexer from a file, or from all safetensors files of a folder.

    Args:
        path: a ``.pt`` file, which may hold tensors by name and nothing else, or safetensors.
        csa_layers: the model's CSA layers, which the released names count.

    Raises:
        UsageError: no such file, another format, code or objects beside tensors, a matrix missing or there twice, a
            tensor of no indexer, shapes that do not fit together, or values that are not finite.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    for file in _weight_files(path):
        for name, tensor in _tensors(file).items():
            layer, matrix = _place(file, name, csa_layers)
            if matrix in found.setdefault(layer, {}):
                raise UsageError(f"'{file}' holds {matrix} of layer {layer} a second time, as {shown(name)}.")
            found[layer][matrix] = tensor.float()
    if not found:
        raise UsageError(f"'{path}' holds no tensor.")
    layers = {}
    for layer, matrices in sorted(found.items()):
        missing = [name for name in MATRICES if name not in matrices]
        if missing:
            raise UsageError(f"'{path}' lacks {', '.join(missing)} of layer {layer}.")
        try:
            layers[layer] = QueryWeights(
                w_dq_RM=matrices["W_DQ"], norm_R=matrices["norm"], w_iuq_OR=matrices["W_IUQ"], w_w_IM=matrices["W_w"]
            )
        except ValueError as error:
            raise UsageError(f"'{path}', layer {layer}: {error}.") from error
    return CompressedIndexer(layers=layers)


def compressed_indexer_hash(path: str | Path) -> str:
    """Return ``name@hash`` for a row: 12 hex digits of SHA-256 over the weights."""
    digest = hashlib.sha256()
    for file in _weight_files(path):
        digest.update(file.read_bytes())
    return f"{Path(path).name}@{digest.hexdigest()[:12]}"


def _weight_files(path: str | Path) -> list[Path]:
    place = user_path(path, what="indexer")
    if not place.is_dir():
        return [place]
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise UsageError(f"Folder '{path}' holds no safetensors file; give the indexer's weights.")
    return files


def _place(file: Path, name: str, csa_layers: Sequence[int]) -> tuple[int, str]:
    """Return the layer and the matrix that a tensor's name means.

    Raises:
        UsageError: it is no tensor of an indexer, or one of a CSA layer that the model does not have.
    """
    released = _RELEASED_NAME.fullmatch(name)
    if released is not None and released[2] in _RELEASED_SPELLINGS:
        ordinal = int(released[1])
        if ordinal >= len(csa_layers):
            raise UsageError(
                f"'{file}' holds '{name}' of compressed-sparse layer {ordinal}, counted from 0, and this model has "
                f"{len(csa_layers)} of them; take the model that the indexer was trained for."
            )
        return csa_layers[ordinal], _RELEASED_SPELLINGS[released[2]]
    match = _NAME.fullmatch(name)
    matrix = _SPELLINGS.get(match[2], match[2]) if match else None
    if match is None or matrix not in MATRICES:
        raise UsageError(
            f"'{file}' holds {shown(name)}, which is no tensor of this indexer: layers.<index>.<matrix>.weight is, "
            f"with a matrix of {', '.join(MATRICES)} (or {', '.join(_SPELLINGS)}), and so is retrievers.l<ordinal>. "
            f"before {', '.join(_RELEASED_SPELLINGS)}."
        )
    return int(match[1]), matrix


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the floating-point tensors of a file by name, on the CPU, rotations left out.

    Raises:
        UsageError: it cannot be read, or holds anything else.
    """
    if file.suffix == ".pt":
        return _pickled(file)
    for name, header in tensor_headers(file).items():
        if not header.is_float:
            raise UsageError(f"'{file}': {shown(name)} has type {header.dtype}, expected floating-point numbers.")
    return finite_weights(file)


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    if file.exists() and not file.is_file():
        raise UsageError(f"Indexer weights '{file}' are no regular file; give a .pt or a safetensors file.")
    try:
        # Tensors alone are unpickled, and no code; a mapped zip file is read only where a tensor is used.
        with warnings.catch_warnings(action="ignore"):  # what it has to say of a format is no news to a user
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UsageError(
            f"Indexer weights '{file}' are damaged, or hold more than tensors, which could run code and was not read; "
            "save them as safetensors."
        ) from error
    except _LOAD_ERRORS as error:
        raise cannot_read(file, error) from error
    if not isinstance(state, dict):
        raise UsageError(f"Indexer weights '{file}' hold a {type(state).__name__}, expected tensors by name.")
    return {
        str(name): _checked(file, str(name), value).clone()
        for name, value in state.items()
        if not _ROTATIONS.fullmatch(str(name))
    }


def _checked(file: Path, name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"'{file}': {shown(name)} is a {type(value).__name__}, expected a tensor.")
    if value.dtype not in _FLOATS or value.layout != torch.strided or value.device.type != "cpu":
        kind = str(value.dtype).removeprefix("torch.")
        raise UsageError(f"'{file}': {shown(name)} has type {kind}, expected plain floating-point numbers.")
    if value.nbytes > value.untyped_storage().nbytes():
        raise UsageError(f"'{file}': {shown(name)} of shape {list(value.shape)} is larger than what the file holds.")
    if not bool(value.isfinite().all()):
        raise UsageError(f"Indexer weights '{file}' are not finite ({shown(name)}); train the indexer again.")
    return value.detach()
