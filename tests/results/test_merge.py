"""Runs merged into one: what may be joined, what is refused, and what is known of each part afterwards."""

from typing import Any

import pytest
from synthetic_rows import demo_rows

from kvscope.errors import UsageError
from kvscope.reports.coverage import coverage
from kvscope.results.frames import make_run
from kvscope.results.merge import Piece, merge_pieces
from kvscope.results.packed import Rows
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import ResidencyRecord, SampleRow

SAMPLES, FOOTPRINTS, INFO = demo_rows()
ONE, OTHER = INFO.lengths_tokens[0], INFO.lengths_tokens[-1]


def piece(seed: int, *, lengths: tuple[int, ...] = INFO.lengths_tokens, name: str = "", **values: Any) -> Piece:
    """A run of the demo's rows under a seed: prompts of its own, same scores."""
    identity = {**INFO.identity, "seed": seed, "footprint": False, "lengths_tokens": list(lengths)}
    info = INFO.model_copy(update={"seed": seed, "lengths_tokens": lengths, "identity": identity})
    rows = [
        row.model_copy(update={"seed": seed, "prompt_sha256": f"{seed:04x}" + row.prompt_sha256[4:]})
        for row in SAMPLES
        if row.length_tokens in lengths
    ]
    return Piece(name=name or f"seed-{seed}", info=info, rows=Rows(samples=rows), **values)


def packed(*pieces: Piece) -> Piece:
    info, rows = merge_pieces(pieces)
    return Piece(name="packed", info=info, rows=rows)


def with_info(given: Piece, **values: Any) -> Piece:
    return Piece(name=given.name, info=given.info.model_copy(update=values), rows=given.rows)


def keys(rows: Rows) -> set[tuple[str, int, int, str]]:
    return {row.key for row in rows.samples}


def test_prompts_of_other_seeds_are_numbered_on() -> None:
    info, rows = merge_pieces([piece(0), piece(1)])
    assert info.samples == 2 * INFO.samples
    assert len(keys(rows)) == len(rows.samples) == 2 * len(SAMPLES)
    (part,) = info.parts
    assert (part.seeds, part.samples, part.commit, part.environment) == (
        (0, 1),
        2 * INFO.samples,
        INFO.commit,
        INFO.environment,
    )
    assert coverage(make_run(rows.samples, [], info=_no_footprint(info), folder="")).complete
    with pytest.raises(UsageError, match="no run to pack"):
        merge_pieces([])


def test_parts_of_other_lengths_and_counts_make_one_run() -> None:
    info, rows = merge_pieces([piece(0, lengths=(ONE,)), piece(1, lengths=(ONE,)), piece(0, lengths=(OTHER,))])
    task = info.tasks[0]
    assert info.lengths_tokens == (ONE, OTHER)
    assert [part.samples for part in info.parts] == [2 * INFO.samples, INFO.samples]
    assert info.expected_samples(task, ONE) == 2 * info.expected_samples(task, OTHER) == 2 * INFO.samples
    assert info.expected_samples(task, 1 << 20) == 0
    state = coverage(make_run(rows.samples, [], info=_no_footprint(info), folder=""))
    assert state.complete
    assert coverage(make_run(rows.samples[:-1], [], info=_no_footprint(info), folder="")).missing


def test_a_packed_run_joins_new_pieces_and_each_part_keeps_its_record() -> None:
    old = packed(piece(0, lengths=(ONE,), command="old command"), piece(1, lengths=(ONE,), command="old command"))
    new = with_info(piece(0, lengths=(OTHER,), name="new"), commit="e" * 40, environment={"gpu": "another"})
    info, rows = merge_pieces([new, old])
    by_length = {part.lengths_tokens: part for part in info.parts}
    assert by_length[(OTHER,)].commit == "e" * 40
    assert by_length[(OTHER,)].environment == {"gpu": "another"}
    before = by_length[(ONE,)]
    assert (before.commit, before.environment, before.seeds) == (INFO.commit, INFO.environment, (0, 1))
    assert before.command == "old command"
    assert [row for row in rows.samples if row.length_tokens == ONE] == old.rows.samples
    again_info, again = merge_pieces([Piece(name="again", info=info, rows=rows)])
    assert again.samples == rows.samples
    assert again_info.parts == info.parts


def test_a_pack_without_records_takes_that_of_its_run() -> None:
    old = packed(piece(2), piece(3))
    bare = tuple(
        part.model_copy(update={"seeds": (), "started_utc": None, "commit": None, "environment": {}})
        for part in old.info.parts
    )
    info, _ = merge_pieces([with_info(old, parts=bare, commit="c" * 40)])
    assert (info.parts[0].commit, info.parts[0].seeds) == ("c" * 40, (2, 3))
    assert info.parts[0].environment == INFO.environment


def test_more_seeds_of_a_packed_cell_are_a_part_of_their_own() -> None:
    info, rows = merge_pieces([packed(piece(0), piece(1)), piece(2)])
    assert [part.seeds for part in info.parts] == [(0, 1), (2,)]
    assert info.expected_samples(info.tasks[0], ONE) == 3 * INFO.samples
    assert len(keys(rows)) == 3 * len(SAMPLES)
    again, _ = merge_pieces([Piece(name="again", info=info, rows=rows)])
    assert again.parts == info.parts


def test_the_same_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match=r"packed and seed-1 both hold .* same seed \(1\)"):
        merge_pieces([packed(piece(0), piece(1)), piece(1)])
    with pytest.raises(UsageError, match="a and b both hold"):
        merge_pieces([piece(0, name="a", lengths=(ONE,)), piece(0, name="b")])
    other_seed = with_info(piece(0, name="renamed"), seed=5)
    relabelled = [row.model_copy(update={"seed": 5}) for row in other_seed.rows.samples]
    with pytest.raises(UsageError, match=r"renamed holds a prompt of .* twice"):
        merge_pieces([piece(0), Piece(name="renamed", info=other_seed.info, rows=Rows(samples=relabelled))])


def test_another_model_or_configuration_is_refused() -> None:
    second = piece(1)
    for key, value in (("model_revision", "sha256:other"), ("max_new_tokens", 99), ("methods", ["dense", "quest"])):
        strange = with_info(second, identity={**second.info.identity, key: value})
        with pytest.raises(UsageError, match=f"seed-1 does not belong with seed-0: they differ in {key}"):
            merge_pieces([piece(0), strange])


def test_keys_of_memory_do_not_part_runs_of_accuracy_alone() -> None:
    second = piece(1)
    changes = {"decode_graph": "auto", "prefill_chunk_tokens": 16384}
    for key, value in changes.items():
        later = with_info(second, identity={**second.info.identity, key: value})
        assert merge_pieces([piece(0), later])[0].samples == 2 * INFO.samples
    measured = with_info(second, identity={**second.info.identity, **changes, "footprint": True})
    with pytest.raises(UsageError, match="decode_graph, footprint, prefill_chunk_tokens"):
        merge_pieces([piece(0), measured])


def test_a_method_that_acted_otherwise_is_refused() -> None:
    label = next(row.method_label for row in SAMPLES if row.method != "dense")

    def changed(seed: int, **values: Any) -> Piece:
        given = piece(seed)
        rows = [
            row.model_copy(update=values) if row.method_label == label and row.status == "ok" else row
            for row in given.rows.samples
        ]
        return Piece(name=given.name, info=given.info, rows=Rows(samples=rows))

    with pytest.raises(UsageError, match=f"{label} ran with other settings"):
        merge_pieces([piece(0), changed(1, config={"recency_tokens": 7})])

    def chosen_by(indexer: str) -> ResidencyRecord:
        return ResidencyRecord(
            tau=64, prompt_tokens=10, resident_tokens=(5,), recalled_bytes=(1,), fallbacks=0, indexer=indexer
        )

    with pytest.raises(UsageError, match=r"other indexer \(a@1 there, b@2 here\)"):
        merge_pieces([changed(0, residency=chosen_by("a@1")), changed(1, residency=chosen_by("b@2"))])


def test_an_unfinished_piece_keeps_the_prompts_of_every_method_whatever_their_score() -> None:
    whole, begun = piece(0, asked_samples=2 * INFO.samples, unfinished="the time was over"), piece(1)
    task, label = INFO.tasks[0], INFO.methods[-1].label

    def is_lost(row: SampleRow) -> bool:
        at_end = (row.task, row.length_tokens, row.sample) == (task, OTHER, INFO.samples - 1)
        return at_end and row.method_label == label

    rows = Rows(samples=[row for row in begun.rows.samples if not is_lost(row)])
    with pytest.raises(UsageError, match="seed-1 is not whole: 1 prompts lack"):
        merge_pieces([piece(0), Piece(name="seed-1", info=begun.info, rows=rows)])
    cut = Piece(
        name="seed-1",
        info=begun.info,
        rows=rows,
        asked_samples=2 * INFO.samples,
        unfinished="the time was over",
    )
    info, merged = merge_pieces([whole, cut])
    (part,) = info.parts
    (cell,) = part.cut
    assert (cell.task, cell.length_tokens, cell.samples, cell.reason) == (
        task,
        OTHER,
        2 * INFO.samples - 1,
        "the time was over",
    )
    left = [row for row in merged.samples if (row.task, row.length_tokens) == (task, OTHER)]
    assert len(left) == cell.samples * len(INFO.methods)
    assert info.expected_samples(task, OTHER) == cell.samples
    assert coverage(make_run(merged.samples, [], info=_no_footprint(info), folder="")).complete
    # Seeds that were never begun lack, too.
    info, _ = merge_pieces([whole])
    assert {cell.samples for cell in info.parts[0].cut} == {INFO.samples}


def _no_footprint(info: RunInfo) -> RunInfo:
    return info.model_copy(update={"footprint_lengths_tokens": ()})
