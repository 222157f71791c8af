"""Folders of trained indexers, whatever their kind: ``indexer.safetensors`` and ``config.json``.

Finding, checking, loading and writing them. A kind (that of lsa, that of dsa) is one ``IndexerFiles``.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from kvscope.errors import UsageError, did_you_mean
from kvscope.methods.shape import ModelShape

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
WEIGHTS_FILE, CONFIG_FILE = "indexer.safetensors", "config.json"


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
        folder = Path(spec).expanduser()
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
        if folder.suffix == ".safetensors" and folder.is_file():
            raise UsageError(
                f"'{spec}' is a file of weights, as deepseek_v4 models take it; on this model an indexer is a folder: "
                f"{self.how_to_train}."
            )
        known = did_you_mean(spec, names) if names else ""
        raise UsageError(f"There is no indexer '{spec}': neither a folder nor a shipped name.{known}")

    def read_config(self, folder: Path) -> ConfigT:
        """Read and check ``config.json``.

        Raises:
            UsageError: unreadable, of another kind or format, or with values that make no sense.
        """
        path = folder / CONFIG_FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, kind = values.pop("format"), values.pop("kind", "lsa")
            if version != FORMAT:
                raise UsageError(f"Indexer '{folder}' has format {version}, this kvscope knows {FORMAT}; train again.")
            if kind != self.kind:
                raise UsageError(
                    f"Indexer '{folder}' is one for {kind}, {self.kind} was asked for; give a folder that "
                    f"{self.train_command} wrote."
                )
            values["layers"] = tuple(values["layers"])
            known = {f.name for f in dataclasses.fields(self.config_type)}  # type: ignore[arg-type]
            if unknown := sorted(set(values) - known):
                raise ValueError(f"unknown keys {', '.join(unknown)}")
            return self.config_type(**values)
        except UsageError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"'{path}' is not an indexer's configuration ({error}); train it again.") from error

    def load(self, folder: Path) -> ModuleT:
        """Load an indexer on the CPU, fp32, in eval mode.

        Raises:
            UsageError: files missing, truncated, or of other shapes than the configuration says.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = self.read_config(folder)
        path = folder / WEIGHTS_FILE
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"Indexer weights '{path}' cannot be read ({error}); train the indexer again.") from error
        with torch.device("meta"):
            indexer = self.module_type(config)
        try:
            indexer.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"'{path}' does not fit its {CONFIG_FILE}: {reason}") from error
        damaged = sorted(name for name, value in weights.items() if not bool(value.isfinite().all()))
        if damaged:
            raise UsageError(f"Indexer weights '{path}' are not finite ({', '.join(damaged[:3])}); train it again.")
        return indexer.float().eval()

    def save(self, indexer: ModuleT, folder: Path) -> None:
        """Write an indexer; each file appears whole or not at all."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (WEIGHTS_FILE + ".tmp")
        save_file({name: value.contiguous() for name, value in indexer.state_dict().items()}, temporary)
        os.replace(temporary, folder / WEIGHTS_FILE)
        temporary = folder / (CONFIG_FILE + ".tmp")
        values = dataclasses.asdict(indexer.config)  # type: ignore[call-overload]
        values = {"format": FORMAT, "kind": self.kind, **values, "layers": list(values["layers"])}
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / CONFIG_FILE)

    def find_shipped(self, misfit: Callable[[ConfigT], str | None]) -> Path | None:
        """Return the first shipped indexer for which ``misfit`` finds nothing wrong."""
        for name in self.shipped_names():
            if misfit(self.read_config(self.shipped_folder / name)) is None:
                return self.shipped_folder / name
        return None


def indexer_hash(folder: Path) -> str:
    """Return the first 12 hex digits of SHA-256 over configuration and weights: what a row names."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


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
