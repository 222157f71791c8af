"""Prompts of a finished run, built again from what its rows and its run.json say: for reading, not for measuring."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.served_facts import served_tokenizer
from kvscope.results.continuing import recorded_tasks, without_hash
from kvscope.results.frames import Run

if TYPE_CHECKING:
    from kvscope.tasks.base import Task


def tokenizer_is_here(run: Run) -> bool:
    """Whether a run's tokenizer is in a folder of this machine, so that nothing has to be fetched for its prompts."""
    from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER, has_weights

    spec = str(run.info.config.get("tokenizer") or run.info.config.get("model", run.info.model))
    return has_weights(spec) or Path(spec) == REFERENCE_MODEL_FOLDER or (Path(spec) / "tokenizer.json").is_file()


class RebuiltPrompts:
    """Builds prompts of a run again.

    Args:
        run: the run.
        model: whose tokenizer to take, as of `kvscope run`; None: the run's own model, or of a served model the
            tokenizer that its run was given.

    Raises:
        UsageError: the model's tokenizer is not there.
    """

    def __init__(self, run: Run, *, model: str | None = None) -> None:
        from kvscope.harness.engine.chat import chat_tokenizer
        from kvscope.harness.engine.loading import load_config, load_tokenizer
        from kvscope.harness.engine.names import resolve_model

        config = run.info.config
        spec = model or str(config.get("tokenizer") or config.get("model", run.info.model))
        if run.info.served:
            tokenizer = served_tokenizer(spec)[0]
        else:
            tokenizer = load_tokenizer(spec, resolve_model(spec)[0], load_config(spec))
        if tokenizer is None:
            raise UsageError(f"Model {spec!r} has no tokenizer, so there is no prompt to show.")
        self._tokenizer: Any = chat_tokenizer(tokenizer, str(config.get("chat_template", "none"))) or tokenizer
        self._run = run
        self._tasks: dict[str, Task] = {}

    def of(self, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt of a row: its text, and (first character, the one behind) of all that the answer needs.

        Args:
            row: task, length_tokens, sample, seed and prompt_sha256 of a sample row.

        Raises:
            UsageError: what is built is another prompt than the row's, or the task cannot be made here.
        """
        from kvscope.tasks.measured import Places

        task, length_tokens, seed = self._task(row["task"]), row["length_tokens"], row["seed"]
        for index in self._numbers(row):
            built = task.build(self._tokenizer, length_tokens=length_tokens, sample=index, seed=seed)
            if built.prompt_sha256 == row["prompt_sha256"]:
                places = Places(self._tokenizer, built.text, built.ids)
                return built.text, [places.characters(*span) for span in built.evidence_spans]
        where = f"{row['task']} at {length_tokens:,} tokens, sample {row['sample']}"
        raise UsageError(
            f"The prompt of {where}, cannot be shown: its row has hash {row['prompt_sha256'][:12]}, and another is "
            "built now. Take the kvscope, the data and the tokenizer (--model) that measured it."
        )

    def _task(self, name: str) -> "Task":
        from kvscope.tasks.registry import create_task

        if name not in self._tasks:
            info = self._run.info
            labels = recorded_tasks(info)
            named = len(labels) == len(info.tasks)  # a merged run has the labels of its first piece
            specs = dict(zip(info.tasks, map(without_hash, labels), strict=True)) if named else {}
            task = create_task(specs.get(name, name))
            if info.config.get("max_new_tokens") is not None:
                task.max_new_tokens = int(str(info.config["max_new_tokens"]))
            self._tasks[name] = task
        return self._tasks[name]

    def _numbers(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Numbers that a prompt may have had: its own; in a merged run, where it was numbered on, that of its seed."""
        if not self._run.info.parts:
            return (row["sample"],)
        rows = self._run.samples
        cell = ["task", "length_tokens", "seed"]
        same = rows[(rows[cell] == [row[name] for name in cell]).all(axis=1)]
        return (int((same["sample"].drop_duplicates() < row["sample"]).sum()), row["sample"])
