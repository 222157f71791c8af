"""Which indexer a method uses on a model: one given by its options, the shipped one, or one of random weights."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Generic

import torch

from kvscope.errors import UsageError
from kvscope.methods.indexer_files import WEIGHTS_FILE, ConfigT, IndexerFiles, ModuleT, indexer_hash, trained_prompts
from kvscope.methods.indexer_weights import finite_weights
from kvscope.methods.shape import ModelShape


class IndexerSource(Generic[ConfigT, ModuleT]):
    """Finds, checks and places one indexer. It learns the model from the first call that names its shape."""

    def __init__(
        self,
        files: IndexerFiles[ConfigT, ModuleT],
        *,
        spec: str | None,
        synthetic: bool,
        seed: int,
        untrained: Callable[[ModelShape], ConfigT],
        misfit: Callable[[ConfigT, ModelShape], str | None],
        missing: str,
    ) -> None:
        """Take the options of a method.

        Args:
            spec: a folder or shipped name; None: the shipped indexer that fits.
            synthetic, seed: draw random weights.
            untrained: the configuration of those for a model.
            misfit: why an indexer cannot be used on a model, naming both sides; None when it can.
            missing: one sentence, what to do where no shipped indexer fits.
        """
        self._files, self._spec = files, spec
        self._synthetic, self._seed, self._untrained = synthetic, seed, untrained
        self._misfit, self._missing = misfit, missing
        self._placed: dict[torch.device, ModuleT] = {}
        self._checked: set[Path] = set()
        self._shape: ModelShape | None = None
        self._found: tuple[ModelShape, Path | None] | None = None

    @functools.cached_property
    def given_folder(self) -> Path | None:
        """The folder that was asked for; None where the model decides.

        Raises:
            UsageError: there is no such folder or name.
        """
        return None if self._spec is None else self._files.folder(self._spec)

    def folder(self) -> Path:
        """Return the folder of the trained indexer.

        Raises:
            UsageError: none was given and none fits the model, or no model was seen yet.
        """
        if self.given_folder is not None:
            return self.given_folder
        shape = self._shape
        if shape is not None and (self._found is None or self._found[0] is not shape):
            # Once a model: every sequence and row asks.
            self._found = shape, self._files.find_shipped(lambda config: self._misfit(config, shape))
        found = None if self._found is None else self._found[1]
        if found is None:
            raise UsageError(self._missing)
        return found

    @property
    def shape(self) -> ModelShape | None:
        """The model that was asked about last; None before."""
        return self._shape

    def see(self, shape: ModelShape | None) -> None:
        """Take note of the model, where one is named."""
        self._shape = self._shape if shape is None else shape

    def config(self, shape: ModelShape) -> ConfigT:
        """Return the configuration of the indexer that chooses on this model.

        Raises:
            UsageError: there is none, it belongs to another model, or its weights are not what its configuration says,
                or are not finite.
        """
        self._shape = shape
        if self._synthetic:
            return self._untrained(shape)
        folder = self.folder()
        config = self._files.read_config(folder)
        why = self._misfit(config, shape)
        if why is not None:
            raise UsageError(f"Indexer '{folder.name}' cannot be used here: {why}; {self._files.how_to_train}.")
        if folder not in self._checked:
            self._files.check_weights(folder, config)
            finite_weights(folder / WEIGHTS_FILE)
            self._checked.add(folder)
        return config

    def module(self, device: torch.device) -> ModuleT:
        """Return the indexer on a device; made or loaded once."""
        if device not in self._placed:
            if self._shape is None:
                raise ValueError("ask unsupported() about the model before its prompts are prefilled")
            config = self.config(self._shape)
            if self._synthetic:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed)
                    indexer = self._files.module_type(config).eval()
            else:
                indexer = self._files.load(self.folder())
            self._placed[device] = indexer.to(device).requires_grad_(False)
        return self._placed[device]

    @property
    def name(self) -> str:
        """Name and hash of the trained indexer: what a row says."""
        folder = self.folder()
        return f"{folder.name}@{indexer_hash(folder)}"

    def files_hash(self, shape: ModelShape) -> str | None:
        """Return the hash of the trained indexer's files on a model; None for a synthetic one, or without one."""
        if self._synthetic:
            return None
        try:
            self.config(shape)
            return indexer_hash(self.folder())
        except UsageError:
            return None  # ``require`` and ``unsupported`` say why

    def trained_prompts(self, shape: ModelShape) -> str | None:
        """Return what the trained indexer learnt from, in words; None for a synthetic one, or without one."""
        if self._synthetic:
            return None
        try:
            return trained_prompts(self.config(shape).trained)
        except UsageError:
            return None

    @property
    def keys_id(self) -> str:
        """What tells this indexer's keys from another's, for the names of collectors."""
        return f"synthetic_{self._seed}" if self._synthetic else indexer_hash(self.folder())
