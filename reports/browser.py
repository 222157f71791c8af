"""The sample browser of a report: which prompts its pages hold, and what they say of each.

A run may have hundreds of thousands of rows, so prompts are chosen before any is read: those whose answers tell methods
apart first, of every task and length as many.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from kvscope.errors import UsageError
from kvscope.reports.look import look
from kvscope.reports.samples import Evidence, segments
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records
from kvscope.results.plain_text import shortened, visible

PromptOf = Callable[[dict[str, Any]], tuple[str, Evidence]]
MOST_ROWS = 20_000
"""Rows that the pages of a report hold together."""
MOST_PAGE_BYTES = 1_500_000
"""Of the samples of one page."""
MOST_TEXT_TOKENS, MOST_ASKED_TOKENS = 300_000, 5_000_000
"""Tokens of all prompts whose texts are built again, some two seconds; and where they are asked for, half a minute."""
MOST_OUTPUT_CHARS, MOST_SEGMENT_CHARS = 400, 1_200
_PROMPT_COLUMNS = ["task", "length_tokens", "sample", "seed", "question_type", "depth", "context_id", "prompt_sha256",
                   "prompt_tokens", "targets"]  # fmt: skip
_ANSWER_COLUMNS = ["method_label", "status", "reason", "score", "output", "stop_reason", "tie"]


@dataclass(frozen=True)
class Samples:
    """What the browser shows.

    Attributes:
        head: what all pages share: names of methods, tasks and lengths.
        pages: prompts of each page; the first stands in the report itself.
        n_found: prompts of the run.
        texts: what is said of the prompts' texts.
    """

    head: dict[str, Any]
    pages: tuple[list[dict[str, Any]], ...]
    n_found: int
    texts: str


def browsed(run: Run, prompt_of: PromptOf | None, *, why_no_texts: str = "", asked: bool = False) -> Samples:
    """Return the prompts that a report's pages hold.

    Args:
        prompt_of: gives a prompt's text and where its evidence stands; None: texts are not shown.
        why_no_texts: the reason then.
        asked: whether somebody waits for the texts, so that more of them are built.
    """
    rows, n_found = chosen_rows(run)
    labels = [method.label for method in run.info.methods]
    baseline = baseline_label(run.info)
    head = {
        "labels": [look().names.get(label, label) for label in labels],
        "baseline": None if baseline is None else labels.index(baseline),
        "tasks": list(run.info.tasks),
    }
    prompts = _prompts(rows, labels, run.info.tasks)
    budget = MOST_ASKED_TOKENS if asked else MOST_TEXT_TOKENS
    texts = _with_texts(prompts, prompt_of, budget) if prompt_of is not None else why_no_texts
    for prompt in prompts:
        del prompt["row"]
    return Samples(head, tuple(_paged(prompts)), n_found, texts)


def chosen_rows(run: Run) -> tuple[pd.DataFrame, int]:
    """Return (rows of the prompts that are shown, all of a prompt's together, prompts of the run)."""
    samples = run.samples
    if not len(samples):
        return samples, 0
    tasks = pd.factorize(samples["task"])[0].astype(np.int64)
    lengths = samples["length_tokens"].to_numpy(np.int64)
    keys = np.stack([tasks, lengths, samples["sample"].to_numpy(np.int64)])
    _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    group = np.asarray(group).reshape(-1)
    wanted = max(1, MOST_ROWS * len(first) // len(samples))
    if wanted >= len(first):
        return samples, len(first)
    told = _tells(samples, group, len(first), baseline_label(run.info))
    cell = pd.factorize(pd.MultiIndex.from_arrays([tasks[first], lengths[first]]))[0]
    order = np.lexsort((samples["sample"].to_numpy(np.int64)[first], -told, cell))
    place = np.empty(len(first), dtype=np.int64)  # of a prompt among those of its task and length
    starts = np.searchsorted(cell[order], np.arange(cell.max() + 1))
    place[order] = np.arange(len(first)) - starts[cell[order]]
    kept = np.zeros(len(first), dtype=bool)
    kept[np.lexsort((cell, place))[:wanted]] = True
    return samples[kept[group]], len(first)


def _tells(samples: pd.DataFrame, group: npt.NDArray[np.int64], n: int, baseline: str | None) -> npt.NDArray[np.int64]:
    """Return 2 for prompts that a method answers otherwise than dense, 1 for others that one fails, 0 for the rest."""
    scores = samples["score"].to_numpy(dtype=np.float64, na_value=np.nan)
    failed = np.zeros(n, dtype=bool)
    failed[group[~(scores >= 1)]] = True
    differs = np.zeros(n, dtype=bool)
    if baseline is not None:
        dense = np.full(n, np.nan)
        is_dense = (samples["method_label"] == baseline).to_numpy(bool)
        dense[group[is_dense]] = scores[is_dense]
        apart = np.nan_to_num(scores, nan=-1.0) != np.nan_to_num(dense[group], nan=-1.0)
        differs[group[apart]] = True
    return np.where(differs, 2, failed.astype(np.int64))


def _prompts(rows: pd.DataFrame, labels: Sequence[str], tasks: Sequence[str]) -> list[dict[str, Any]]:
    place = {label: index for index, label in enumerate(labels)}
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in records(rows[[*_PROMPT_COLUMNS, *_ANSWER_COLUMNS]]):
        key = (tasks.index(row["task"]), row["length_tokens"], row["sample"])
        prompt = found.get(key)
        if prompt is None:
            prompt = found[key] = {
                "row": {name: row[name] for name in _PROMPT_COLUMNS},
                "task": key[0],
                "length": row["length_tokens"],
                "sample": row["sample"],
                "seed": row["seed"],
                "type": row["question_type"] if row["question_type"] != row["task"] else None,
                "depth": None if row["depth"] is None else round(row["depth"], 3),
                "hash": row["prompt_sha256"][:12],
                "tokens": row["prompt_tokens"],
                "targets": [_short(target) for target in row["targets"]],
                "answers": [None] * len(labels),
            }
        said = row["reason"] if row["output"] is None else row["output"]
        score = None if row["score"] is None else round(row["score"], 4)
        prompt["answers"][place[row["method_label"]]] = [
            score, "" if row["status"] == "ok" else row["status"], _short(said or ""), int(bool(row["tie"])),
        ]  # fmt: skip
    return [found[key] for key in sorted(found)]


def _short(text: str) -> str:
    return shortened(visible(text), most=MOST_OUTPUT_CHARS)


def _with_texts(prompts: list[dict[str, Any]], prompt_of: PromptOf, most_tokens: int) -> str:
    """Give prompts their texts, as many as may be built; return what is to be said of them."""
    left, n_texts = most_tokens, 0
    # Of every task and length one after the other, so that none is left without.
    seen: dict[tuple[int, int], int] = {}
    order = []
    for place, prompt in enumerate(prompts):
        cell = (prompt["task"], prompt["length"])
        seen[cell] = seen.get(cell, 0) + 1
        order.append((seen[cell], place))
    for _, place in sorted(order):
        prompt = prompts[place]
        if prompt["tokens"] > left:
            continue
        left -= prompt["tokens"]
        try:
            text, evidence = prompt_of(prompt["row"])
        except UsageError as error:
            return f"Texts of prompts are not shown: {error}"
        prompt["text"] = [[kind, _cut(part)] for kind, part in segments(text, evidence)]
        n_texts += 1
    if n_texts == len(prompts):
        return "Texts are built again from the prompts' seeds, and their hashes compared with the rows'."
    return (
        f"Texts of {n_texts:,} prompts are built again from their seeds, and their hashes compared with the rows'; "
        "kvscope report --prompts builds more, and kvscope samples --prompt any other."
    )


def _cut(part: str | int) -> str | int:
    return (
        part if isinstance(part, int) else shortened("\n".join(map(visible, part.split("\n"))), most=MOST_SEGMENT_CHARS)
    )


def _paged(prompts: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Split prompts into pages of so many bytes."""
    page: list[dict[str, Any]] = []
    used = 0
    for prompt in prompts:
        size = _size(prompt)
        if page and used + size > MOST_PAGE_BYTES:
            yield page
            page, used = [], 0
        page.append(prompt)
        used += size
    yield page


def _size(value: Any) -> int:
    """About the bytes of a value as JSON, without making it."""
    if isinstance(value, str):
        return 2 * len(value) + 2
    if isinstance(value, dict):
        return sum(len(key) + 4 + _size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return 2 + sum(1 + _size(inner) for inner in value)
    return 6
