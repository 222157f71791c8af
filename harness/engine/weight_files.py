"""What the weights' files of a folder say before any weights are read: headers, held against the config.

Names of tensors are compared where they agree: transformers renames some while it loads.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, shown
from kvscope.harness.engine.folder_files import is_there, json_object
from kvscope.harness.engine.loading import explained
from kvscope.harness.engine.names import cannot_load
from kvscope.harness.engine.quantised import quantization
from kvscope.harness.engine.weights import surplus_layers

Shapes = dict[str, tuple[int, ...]]

# In the order in which transformers looks for them.
_WHOLE, _PICKLED, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"
_TRAINED = (".weight", ".bias")
_LFS = b"version https://git-lfs"


def check_weight_files(spec: str, where: str, config: Any, model: Any) -> None:
    """Refuse a folder whose weights are damaged, incomplete or of other shapes than its config's model.

    Args:
        spec: the model as asked for.
        where: its folder; anything else is not looked at.
        config: its config.
        model: the model without storage, or None.

    Raises:
        UsageError: naming the file or the tensor.
    """
    folder = Path(where)
    if not folder.is_dir():
        return
    shapes: Shapes = {}
    _check_adapter(spec, folder)
    for path, named in _files(spec, folder):
        there = _shapes_in(spec, path, plain=quantization(config) is None)
        lacking = sorted(named - there.keys())
        if lacking:
            raise UsageError(cannot_load(spec, f"{path.name} lacks {_few(lacking)}, which the index names"))
        shapes |= there
    if model is not None and quantization(config) is None:
        _check_shapes(spec, shapes, model)


def _files(spec: str, folder: Path) -> list[tuple[Path, set[str]]]:
    """Return the files that transformers will read, and the tensors that an index promises in each."""
    with explained(spec):
        explicit = json_object(folder / "config.json").get("transformers_weights")
        if explicit is not None:
            if not isinstance(explicit, str) or not is_there(folder / explicit):
                raise ValueError(f"the folder lacks {shown(explicit)}, which its config names (transformers_weights)")
            path = folder / explicit
            return _shards(spec, path) if explicit.endswith(_INDEX) else [(path, set())]
    for name in (_WHOLE, _PICKLED):
        index = folder / f"{name}{_INDEX}"
        with explained(spec):
            whole, in_shards = is_there(folder / name), is_there(index)
        if whole:
            return [(folder / name, set())]
        if in_shards:
            return _shards(spec, index)
    others = sorted(path.name for end in ("gguf", "pth", "ckpt", "h5", "msgpack") for path in folder.glob(f"*.{end}"))
    there = f"; {_few(others)} cannot be read, save it as safetensors" if others else ""
    raise UsageError(cannot_load(spec, f"the folder has neither {_WHOLE} nor {_PICKLED}, whole or in shards{there}"))


def _shards(spec: str, index: Path) -> list[tuple[Path, set[str]]]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        named: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            named.setdefault(str(file), set()).add(tensor)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(cannot_load(spec, f"{index.name} is not an index of shards (JSON with weight_map)")) from error
    with explained(spec):
        missing = sorted(name for name in named if not is_there(index.parent / name))
    if missing:
        raise UsageError(cannot_load(spec, f"the folder lacks {_few(missing)}, which {index.name} names"))
    return [(index.parent / name, tensors) for name, tensors in sorted(named.items())]


def _check_adapter(spec: str, folder: Path) -> None:
    """Refuse an adapter beside the weights where transformers would leave it out without a word."""
    if (folder / "adapter_config.json").is_file() and find_spec("peft") is None:
        reason = "an adapter lies beside its weights, and without the package peft it would be left out: merge the two"
        raise UsageError(cannot_load(spec, reason))


def _shapes_in(spec: str, path: Path, *, plain: bool) -> Shapes:
    """Return the tensors of one file and their shapes. Reads its header.

    Args:
        plain: whether all of them must be numbers that a model computes with.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError as error:
        raise UsageError(cannot_load(spec, f"{path.name} cannot be read ({error.strerror})")) from error
    if pointer:
        reason = f"{path.name} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
        raise UsageError(cannot_load(spec, reason))
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                odd = next((name for name, each in found.items() if plain and _whole(each.get_dtype())), None)
                if odd is not None and odd.endswith(_TRAINED):
                    reason = f"its weights hold {odd} as {found[odd].get_dtype()}, and its config names no quantisation"
                    raise UsageError(cannot_load(spec, reason))
                return {name: tuple(each.get_shape()) for name, each in found.items()}
        except SafetensorError as error:
            reason = f"{path.name} is cut off or damaged ({str(error).strip()}); fetch or save it again"
            raise UsageError(cannot_load(spec, reason)) from error
    with explained(spec):
        try:
            # Tensors alone are unpickled, and no code; a mapped zip file is not read through.
            held = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (EOFError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path.name} is cut off or damaged, or no file of PyTorch's") from error
        if not isinstance(held, dict):
            raise ValueError(f"{path.name} holds no tensors by name")
    return {str(name): tuple(each.shape) for name, each in held.items() if isinstance(each, torch.Tensor)}


def _whole(dtype: str) -> bool:
    """Whether a type of safetensors is of whole numbers."""
    return dtype.startswith(("I", "U", "BOOL"))


def _check_shapes(spec: str, found: Shapes, model: Any) -> None:
    wanted: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in found):  # saved without the head
        found = {name if name in wanted else prefix + name: shape for name, shape in found.items()}
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            reason = f"its weights hold {name} as {list(found[name])}, and its config makes it {list(wanted[name])}"
            raise UsageError(cannot_load(spec, reason))
    _check_unused(spec, found.keys() - wanted.keys(), model)
    if found.keys() - wanted.keys():  # names that transformers may turn into others
        return
    spared = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["$^"])
    tied = model.all_tied_weights_keys
    missing = [name for name in sorted(wanted.keys() - found.keys() - tied.keys()) if not re.search(spared, name)]
    if missing:
        raise UsageError(cannot_load(spec, f"its weights lack {_few(missing)}, which would be random"))


def _check_unused(spec: str, names: Collection[str], model: Any) -> None:
    """Refuse weights that the config leaves no place for, of modules and layers that are like those it has."""
    spared = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["$^"]))
    unused = sorted(name for name in names if not spared.search(name))
    own = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    in_vain = [name for name in unused if name.endswith(_TRAINED) and name.rpartition(".")[0] in own]
    in_vain += surplus_layers(unused, model)
    if in_vain:
        reason = f"its config leaves no place for {_few(in_vain)} of its weights, so it would be another model"
        raise UsageError(cannot_load(spec, reason))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
