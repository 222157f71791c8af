"""Several runs of one configuration as one: pieces under different seeds, of other tasks and lengths, or packed before.

What measured each part (commit, environment, command, seeds) stays with it, in `RunInfo.parts`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvscope.errors import UsageError
from kvscope.results.packed import Rows
from kvscope.results.run_schema import CutCell, Resumption, RunInfo, RunPart
from kvscope.results.schema import SampleRow

#: Identity keys that pieces of one run may differ in.
PIECE_KEYS = {"seed", "tasks", "lengths_tokens", "samples"}
#: Identity keys that decide memory and time alone: no answer depends on them (on a prefill's chunks up to rounding).
MEMORY_KEYS = {
    "kv",
    "gpu_budget_bytes",
    "find_max",
    "find_max_resolution",
    "find_max_limit_tokens",
    "throughput",
    "max_batch",
    "footprint_lengths_tokens",
    "footprint_decode_tokens",
    "decode_graph",
    "prefill_chunk_tokens",
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One run to merge: measured, or packed before (then it has parts of its own).

    Attributes:
        name: what errors call it.
        command: what measures it, where known; pieces of one part differ in the seed alone.
        fewer: why its (task, length) cells have fewer prompts than usual.
        asked_samples: prompts a (task, length) that were asked for over all seeds of its part; None: what the pieces
            given were asked for.
        unfinished: why it is taken although rows are missing; None: it has to be whole.
    """

    name: str
    info: RunInfo
    rows: Rows
    command: str | None = None
    fewer: str | None = None
    asked_samples: int | None = None
    unfinished: str | None = None


@dataclass
class _Segment:
    """Rows of one part of one piece."""

    piece: Piece
    part: RunPart
    samples: list[SampleRow]


@dataclass
class _Merged:
    """What is known of the rows taken so far."""

    taken: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """(task, length, seed) -> name of the piece."""
    counts: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    """(task, length) -> prompts."""
    prompts: set[tuple[str, int, str, str]] = field(default_factory=set)
    settings: dict[tuple[str, str, int, str], tuple[str, str]] = field(default_factory=dict)
    """(method, task, length, tokens of the prompt) -> its settings and the piece that showed them first."""
    indexers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """method -> its indexer and the piece that showed it first."""


def merge_pieces(pieces: Sequence[Piece]) -> tuple[RunInfo, Rows]:
    """Join runs of one configuration into one: under different seeds, of other tasks, lengths and counts, or packed.

    The prompts of each (task, length) are numbered on in the order of the pieces.

    Raises:
        UsageError: none given; configurations, model revisions or methods that differ; a prompt that two of them hold;
            a piece that is not whole and does not say why.
    """
    if not pieces:
        raise UsageError("There is no run to pack.")
    first, state, rows = pieces[0], _Merged(), Rows()
    segments = []
    for piece in pieces:
        _refuse_other_configuration(first, piece)
        segments += _segments(piece)
        rows.footprints += piece.rows.footprints
        rows.max_contexts += piece.rows.max_contexts
        rows.throughputs += piece.rows.throughputs
    for segment in segments:
        segment.samples = _whole_prompts(segment)
        _refuse_same_prompts(segment, state)
        _refuse_other_methods(segment, state)
        rows.samples += _numbered_on(segment, state)
    parts = tuple(_joined(group) for group in _groups(segments)) if first.info.tasks else ()
    planned = {(cell.method_label, cell.length_tokens): cell for piece in pieces for cell in piece.info.plan}
    infos = [piece.info for piece in pieces]
    info = first.info.model_copy(
        update={
            "tasks": tuple(dict.fromkeys(task for info in infos for task in info.tasks)),
            "lengths_tokens": tuple(sorted({length for info in infos for length in info.lengths_tokens})),
            "samples": max(state.counts.values(), default=first.info.samples),
            "parts": parts,
            "plan": tuple(planned.values()),
            # Parts have their own.
            "resumptions": () if parts else _changed_surroundings(infos),
        }
    )
    return info, rows


def _refuse_other_configuration(first: Piece, piece: Piece) -> None:
    left, right = first.info.identity, piece.info.identity
    free = set(PIECE_KEYS)
    if left.get("footprint") is False and right.get("footprint") is False:
        free |= MEMORY_KEYS
    differing = sorted(key for key in (left.keys() | right.keys()) - free if left.get(key) != right.get(key))
    if differing:
        told = "; ".join(f"{key}: {left.get(key)!r} there, {right.get(key)!r} here" for key in differing)
        raise UsageError(
            f"{piece.name} does not belong with {first.name}: they differ in {', '.join(differing)} ({told}), not in "
            "seed, tasks, lengths and samples alone. Measure it again with the other's configuration, or leave it out."
        )


def _segments(piece: Piece) -> list[_Segment]:
    """Split a packed run into its parts again; any other run is one part."""
    info = piece.info
    parts = info.parts or (RunPart(tasks=info.tasks, lengths_tokens=info.lengths_tokens, samples=info.samples),)
    segments, left = [], list(piece.rows.samples)
    for part in parts:
        mine: list[SampleRow] = []
        others: list[SampleRow] = []
        for row in left:
            (mine if part.holds(row.task, row.length_tokens, row.seed) else others).append(row)
        left = others
        # A part that was packed before parts had a record of their own: the record of its run is its own.
        if part.started_utc is None:
            part = part.model_copy(
                update={
                    "kvscope_version": info.kvscope_version,
                    "started_utc": info.started_utc,
                    "commit": info.commit,
                    "dirty": info.dirty,
                    "environment": info.environment,
                    "resumptions": info.resumptions,
                }
            )
        seeds = part.seeds or (tuple(sorted({row.seed for row in mine})) if info.parts else (info.seed,))
        told = {"seeds": seeds, "command": part.command or piece.command, "fewer": part.fewer or piece.fewer}
        segments.append(_Segment(piece, part.model_copy(update=told), mine))
    if left:
        row = left[0]
        raise UsageError(
            f"{piece.name} holds rows that it was not asked for: {row.task} at {row.length_tokens} tokens, seed "
            f"{row.seed}. Restore it from its source."
        )
    return segments


def _whole_prompts(segment: _Segment) -> list[SampleRow]:
    """Return the rows of the prompts that every method has a row of, whatever its score and status.

    Raises:
        UsageError: other prompts are missing, and the piece does not say why.
    """
    labels = {method.label for method in segment.piece.info.methods}
    done: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for row in segment.samples:
        done[row.task, row.length_tokens, row.sample].add(row.method_label)
    whole = {key for key, found in done.items() if found >= labels}
    part = segment.part
    cells = [(task, length) for task in part.tasks for length in part.lengths_tokens]
    missing = sum(part.expected_samples(*cell) for cell in cells) - len(whole)
    if missing > 0 and segment.piece.unfinished is None:
        raise UsageError(
            f"{segment.piece.name} is not whole: {missing} prompts lack the row of a method. Measure it to the end, or "
            "say why it is kept as it is."
        )
    return [row for row in segment.samples if (row.task, row.length_tokens, row.sample) in whole]


def _refuse_same_prompts(segment: _Segment, state: _Merged) -> None:
    for task in segment.part.tasks:
        for length in segment.part.lengths_tokens:
            for seed in segment.part.seeds:
                before = state.taken.setdefault((task, length, seed), segment.piece.name)
                # Parts of one packed run have no prompt in common, and a piece is one part.
                if before != segment.piece.name:
                    raise UsageError(
                        f"{before} and {segment.piece.name} both hold {task} at {length} tokens under the same seed "
                        f"({seed}): their prompts are the same. Leave one out."
                    )
    for row in segment.samples:
        key = (row.task, row.length_tokens, row.prompt_sha256, row.method_label)
        if key in state.prompts:
            raise UsageError(
                f"{segment.piece.name} holds a prompt of {row.task} at {row.length_tokens} tokens twice, or one that "
                f"another piece holds (seed {row.seed}, sample {row.sample}). Leave one out."
            )
        state.prompts.add(key)


def _refuse_other_methods(segment: _Segment, state: _Merged) -> None:
    """Refuse a method that acted under other settings, or by another indexer, than in the pieces before."""
    name = segment.piece.name
    for row in segment.samples:
        asked = json.dumps(row.config, sort_keys=True)
        # From the question on, the tokens a method acts on differ from prompt to prompt, and settings with them.
        prompt = row.prompt_sha256 if row.method_from == "question" else str(row.prompt_tokens)
        there, before = state.settings.setdefault(
            (row.method_label, row.task, row.length_tokens, prompt), (asked, name)
        )
        what = "settings"
        if there == asked and row.residency is not None and row.residency.indexer is not None:
            what, asked = "indexer", row.residency.indexer
            there, before = state.indexers.setdefault(row.method_label, (asked, name))
        if there != asked:
            raise UsageError(
                f"{name} does not belong with {before}: {row.method_label} ran with other {what} ({there} there, "
                f"{asked} here). Measure one of them again, or leave it out."
            )


def _numbered_on(segment: _Segment, state: _Merged) -> list[SampleRow]:
    numbers: dict[tuple[str, int, int], int] = {}
    for task, length, sample in sorted({(row.task, row.length_tokens, row.sample) for row in segment.samples}):
        numbers[task, length, sample] = state.counts[task, length]
        state.counts[task, length] += 1
    return [
        row.model_copy(update={"sample": numbers[row.task, row.length_tokens, row.sample]}) for row in segment.samples
    ]


def _groups(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Gather what was measured as one part under several seeds; parts that were packed before stay as they are."""
    groups: dict[Any, list[_Segment]] = {}
    for i, segment in enumerate(segments):
        part = segment.part
        key = i if segment.piece.info.parts else (part.tasks, part.lengths_tokens, part.command, part.fewer)
        groups.setdefault(key, []).append(segment)
    return list(groups.values())


def _joined(group: Sequence[_Segment]) -> RunPart:
    head, piece = group[0].part, group[0].piece
    if piece.info.parts:
        return head
    asked = piece.asked_samples or sum(segment.part.samples for segment in group)
    found: dict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)
    for place, segment in enumerate(group):
        for row in segment.samples:
            found[row.task, row.length_tokens].add((place, row.sample))
    reason = next((segment.piece.unfinished for segment in group if segment.piece.unfinished), None)
    cut = tuple(
        CutCell(task=task, length_tokens=length, samples=len(found[task, length]), reason=reason)
        for task in head.tasks
        for length in head.lengths_tokens
        if len(found[task, length]) < asked and reason is not None
    )
    return head.model_copy(
        update={
            "samples": asked,
            "seeds": tuple(seed for segment in group for seed in segment.part.seeds),
            "cut": cut,
            "resumptions": _changed_surroundings([segment.piece.info for segment in group]),
        }
    )


def _changed_surroundings(infos: Sequence[RunInfo]) -> tuple[Resumption, ...]:
    """Return the later starts whose surroundings were not the first one's."""
    first = infos[0]
    known = (first.commit, first.dirty, first.environment)
    notes: list[Resumption] = []
    for info in infos:
        start = Resumption(
            started_utc=info.started_utc,
            kvscope_version=info.kvscope_version,
            commit=info.commit,
            dirty=info.dirty,
            environment=info.environment,
        )
        for note in ([] if info is first else [start]) + list(info.resumptions):
            if (note.commit, note.dirty, note.environment) != known and not any(
                (note.commit, note.dirty, note.environment) == (other.commit, other.dirty, other.environment)
                for other in notes
            ):
                notes.append(note)
    return tuple(notes)
