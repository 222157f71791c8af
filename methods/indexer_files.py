"""Folders of trained indexers, whatever their kind: ``indexer.safetensors`` and ``config.json``.

Finding, checking, loading and writing them. A kind (that of lsa, that of dsa) is one ``IndexerFiles``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.files import first_line, make_folder, whole_file
from kvscope.methods.indexer_weights import finite_weights, tensor_headers
from kvscope.methods.shape import ModelShape
from kvscope.paths import user_path
from kvscope.results.reading import parse_json, read_regular

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
WEIGHTS_FILE, CONFIG_FILE = "indexer.safetensors", "config.json"
MOST_CONFIG_BYTES = 16 * 2**20
_MOST_STARTS = 20
"""How far back an indexer's record is followed to the one that saw documents."""


class TrainedConfig(Protocol):
    """What the configuration of every kind of indexer has: the model it was trained for."""

    @property
    def model(self) -> str: ...
    @property
    def model_revision(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def trained(self) -> Mapping[str, Any]: ...


ConfigT = TypeVar("ConfigT", bound=TrainedConfig)
ModuleT = TypeVar("ModuleT", bound="nn.Module")


@dataclass(frozen=True, kw_only=True)
class IndexerFiles(Generic[ConfigT, ModuleT]):
    """One kind of indexer on disk.

    Attributes:
        kind: the method it belongs to; written to the configuration, so that kinds are not mixed up.
        config_type: frozen dataclass of plain values.
        module_type: makes the module from a configuration; the module has it as ``config``.
        shipped_folder: holds one folder an indexer that comes with kvscope.
        how_to_train: what to do without one, after "and" or ":".
    """

    kind: str
    config_type: type[ConfigT]
    module_type: Callable[[ConfigT], ModuleT]
    shipped_folder: Path
    how_to_train: str

    @property
    def train_command(self) -> str:
        """The command that writes such folders."""
        return f"kvscope {self.kind} train"

    def shipped_names(self) -> list[str]:
        """Return the names of the indexers that come with kvscope."""
        return sorted(path.parent.name for path in self.shipped_folder.glob(f"*/{CONFIG_FILE}"))

    def folder(self, spec: str) -> Path:
        """Return the folder of an indexer given as a path or a shipped name.

        Raises:
            UsageError: neither exists.
        """
        folder = user_path(spec, what="indexer")
        if (folder / CONFIG_FILE).is_file():
            return folder
        names = self.shipped_names()
        if spec in names:
            return self.shipped_folder / spec
        if folder.is_dir():
            raise UsageError(
                f"Folder '{spec}' holds no indexer: {CONFIG_FILE} is missing; give the folder {self.train_command} "
                "wrote."
            )
        if folder.suffix in (".safetensors", ".pt") and folder.is_file():
            raise UsageError(
                f"'{spec}' is a file of weights, as deepseek_v4 models take it; on this model an indexer is a folder: "
                f"{self.how_to_train}."
            )
        known = did_you_mean(spec, names) if names else ""
        raise UsageError(f"There is no indexer '{spec}': neither a folder nor a shipped name.{known}")

    def read_config(self, folder: Path) -> ConfigT:
        """Read and check ``config.json``; once, while the file stays as it is: every sequence asks for it.

        Raises:
            UsageError: unreadable, of another kind or format, or with values that make no sense.
        """
        return _kept((self.kind, self.config_type), folder / CONFIG_FILE, lambda: self._read_config(folder))

    def _read_config(self, folder: Path) -> ConfigT:
        path = folder / CONFIG_FILE
        try:
            values: dict[str, Any] = parse_json(read_regular(path, most_bytes=MOST_CONFIG_BYTES) or b"")
            version, kind = values.pop("format"), values.pop("kind", "lsa")
            if version != FORMAT:
                raise UsageError(f"Indexer '{folder}' has format {version}, this kvscope knows {FORMAT}; train again.")
            if kind != self.kind:
                raise UsageError(
                    f"Indexer '{folder}' is one for {kind}, {self.kind} was asked for; give a folder that "
                    f"{self.train_command} wrote."
                )
            known = {f.name for f in dataclasses.fields(self.config_type)}  # type: ignore[arg-type]
            if unknown := sorted(set(values) - known):
                raise ValueError(f"unknown keys {', '.join(unknown)[:200]}")
            return TypeAdapter(self.config_type).validate_json(json.dumps(values), strict=True)
        except UsageError:
            raise
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "it"
            why = str(problem["msg"]).removeprefix("Value error, ")
            raise UsageError(f"'{path}' is not an indexer's configuration ({key}: {why}); train it again.") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = first_line(error)
            raise UsageError(f"'{path}' is not an indexer's configuration ({why}); train it again.") from error

    def check_weights(self, folder: Path, config: ConfigT) -> ModuleT:
        """Check what the weights' header says against the configuration; no weights are read.

        Returns:
            The module that they fit, on the meta device.

        Raises:
            UsageError: the file is missing or cut, or has other tensors, shapes or types.
        """
        import torch

        path = folder / WEIGHTS_FILE
        found = tensor_headers(path)
        try:
            with torch.device("meta"):
                indexer = self.module_type(config)
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no tensor has
            raise UsageError(
                f"'{folder / CONFIG_FILE}' asks for an indexer that cannot be made ({first_line(error)}); train it "
                "again."
            ) from error
        expected = {name: tuple(value.shape) for name, value in indexer.state_dict().items()}
        for name in (*expected, *found):
            if name not in found:
                why = f"tensor {shown(name)} is missing"
            elif name not in expected:
                why = f"tensor {shown(name)} is none of its own"
            elif found[name].shape != expected[name]:
                why = f"tensor {shown(name)} has shape {list(found[name].shape)}, expected {list(expected[name])}"
            elif not found[name].is_float:
                why = f"tensor {shown(name)} has type {found[name].dtype}, expected floating-point numbers"
            else:
                continue
            raise UsageError(f"'{path}' does not fit its {CONFIG_FILE}: {why}; train the indexer again.")
        return indexer

    def load(self, folder: Path) -> ModuleT:
        """Load an indexer on the CPU, fp32, in eval mode.

        Raises:
            UsageError: files missing, truncated, of other shapes than the configuration says, or with values that are
                not finite.
        """
        indexer = self.check_weights(folder, self.read_config(folder))
        indexer.load_state_dict(finite_weights(folder / WEIGHTS_FILE), assign=True)
        return indexer.float().eval()

    def save(self, indexer: ModuleT, folder: Path) -> None:
        """Write an indexer; each file appears whole or not at all.

        Raises:
            EnvironmentProblem: the disk is full, or files may not be so large.
        """
        from safetensors.torch import save_file

        make_folder(folder)
        with whole_file(folder / WEIGHTS_FILE) as temporary:
            save_file({name: value.contiguous() for name, value in indexer.state_dict().items()}, temporary)
        values = dataclasses.asdict(indexer.config)  # type: ignore[call-overload]
        values = {"format": FORMAT, "kind": self.kind, **values, "layers": list(values["layers"])}
        with whole_file(folder / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def find_shipped(self, misfit: Callable[[ConfigT], str | None]) -> Path | None:
        """Return the first shipped indexer for which ``misfit`` finds nothing wrong."""
        for name in self.shipped_names():
            if misfit(self.read_config(self.shipped_folder / name)) is None:
                return self.shipped_folder / name
        return None


def indexer_hash(folder: Path) -> str:
    """Return the first 12 hex digits of SHA-256 over configuration and weights: what a row names."""

    def digest() -> str:
        found = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            found.update((folder / name).read_bytes())
        return found.hexdigest()[:12]

    return _kept(("hash", folder / CONFIG_FILE, _stamp(folder / CONFIG_FILE)), folder / WEIGHTS_FILE, digest)


_ValueT = TypeVar("_ValueT")
_values: dict[tuple[object, Path], tuple[object, Any]] = {}


def _kept(what: object, path: Path, make: Callable[[], _ValueT]) -> _ValueT:
    """Return what ``make`` reads of a file, made anew where the file is another than the last time."""
    stamp = _stamp(path)
    found = _values.get((what, path))
    if found is not None and found[0] == stamp and stamp is not None:
        return found[1]  # type: ignore[no-any-return]
    value = make()
    _values[what, path] = (stamp, value)
    return value


def _stamp(path: Path) -> object:
    """Return what changes when a file is written; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def owner_mismatch(config: TrainedConfig, shape: ModelShape) -> str | None:
    """Return why an indexer is not one for this model and layers, naming both sides; None when it is."""
    if config.model_revision != shape.revision:
        return (
            f"it was trained for model '{config.model}' ({config.model_revision or 'no revision'}), this model is "
            f"{shape.revision or 'of no known revision'}"
        )
    foreign = sorted(set(config.layers) - set(shape.layers))
    if foreign:
        return (
            f"it reads layers {listed(config.layers)}, and of these kvscope does not manage {listed(foreign)} in this "
            f"model (it manages {listed(shape.layers)})"
        )
    return None


def listed(layers: "tuple[int, ...] | list[int]") -> str:
    """Return layers as text."""
    return ", ".join(map(str, layers))


def prompts_text(chat_template: object) -> str:
    """Return what prompts are, by the hash of their chat template; None where they have none."""
    return "plain texts" if chat_template is None else f"prompts in the chat template {shown(str(chat_template)[:19])}"


def trained_prompts(trained: Mapping[str, Any]) -> str | None:
    """Return what an indexer was trained on, as ``prompts_text``; None where its record does not tell.

    Records from before there was a choice say nothing of it: all prompts were plain texts then.

    Args:
        trained: the record in its configuration, which may come from anywhere.
    """
    record: object = trained
    for _ in range(_MOST_STARTS):
        if not isinstance(record, Mapping):
            return None
        data, start = record.get("data"), record.get("start")
        if isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
            return prompts_text(data[0].get("chat_template"))
        record = start.get("trained") if isinstance(start, Mapping) else None
    return None
