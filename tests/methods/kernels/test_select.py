"""Selection without a sort against its reference; the slot table over many changes.

Shapes: R rows of logits, n chunks, S slots.
"""

import pytest
import torch
from kernel_tools import DEVICE, generator, randn

from kvscope.methods.kernels.select import kernel, reference
from kvscope.methods.kernels.select.kernel import (
    apply,
    diff,
    empty_delta,
    empty_selection,
    empty_slots,
    select,
    write_table,
)
from kvscope.methods.kernels.select.reference import diff_reference, select_reference


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", 64)


def threshold(value):
    return torch.tensor([value], dtype=torch.float32, device=DEVICE)


def choose(logits, value, *, capacity=None, **options):
    n = logits.shape[1]
    found = empty_selection(n, n if capacity is None else capacity, DEVICE)
    select(logits, threshold(value), found, **options)
    return found


def listed(chunks, n):
    return chunks[: int(n)].tolist()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("value", [-100.0, 0.7, 100.0])
@pytest.mark.parametrize("ends", [(0, 0), (2, 3)])
def test_equals_the_reference(n, value, ends):
    logits = randn(3, n, seed=n)
    options = {"n_sink": ends[0], "n_recent": ends[1]}
    found = choose(logits, value, **options)
    expected = select_reference(logits, value, **options)
    assert listed(found.chunks_K, found.n) == expected.tolist()
    assert found.wanted_n.nonzero()[:, 0].tolist() == expected.tolist()


def test_ties_at_the_threshold_are_chosen_and_nan_is_not():
    logits = torch.zeros(1, 100, device=DEVICE)
    logits[0, 10] = -1e-6
    logits[0, 11] = torch.nan
    logits[0, 12] = -torch.inf
    found = choose(logits, 0.0)
    assert listed(found.chunks_K, found.n) == [c for c in range(100) if c not in (10, 11, 12)]


def test_too_many_are_counted_and_the_first_are_listed():
    found = choose(torch.zeros(1, 200, device=DEVICE), 0.0, capacity=70)
    assert int(found.n) == 200
    assert found.chunks_K.tolist() == list(range(70))
    assert found.wanted_n.nonzero()[:, 0].tolist() == list(range(70))


def check_table(slots, chosen):
    """Both directions agree, and exactly the chosen chunks have a slot."""
    held = slots.chunk_of_slot_S.tolist()
    assert sorted(c for c in held if c >= 0) == chosen
    assert [held[slots.slot_of_chunk_n[c]] for c in chosen] == chosen
    assert int((slots.slot_of_chunk_n >= 0).sum()) == len(chosen)


def test_a_slot_table_follows_changing_choices():
    n, S = 150, 90
    slots, delta = empty_slots(n, S, DEVICE), empty_delta(S, S, DEVICE)
    found = empty_selection(n, S, DEVICE)
    # Growth, shrinking, nothing, full churn, no change, one chunk.
    sets = [range(40), range(20, 100), range(90, 95), [], range(90), range(60, 150), range(60, 150), [7]]
    table = torch.full((2 * S,), -7, dtype=torch.int32, device=DEVICE)
    n_tokens = torch.zeros((1, 1), dtype=torch.int32, device=DEVICE)
    for chosen in map(list, sets):
        logits = torch.full((1, n), -1.0, device=DEVICE)
        logits[0, chosen] = 1.0
        before = slots.chunk_of_slot_S.clone()
        select(logits, threshold(0.0), found)
        diff(found, slots, delta)
        missing, free = diff_reference(torch.tensor(chosen, dtype=torch.int32, device=DEVICE), before)
        assert listed(delta.missing_K, delta.n_missing) == missing.tolist()
        assert listed(delta.free_S, delta.n_free) == free.tolist()
        assert torch.equal(slots.chunk_of_slot_S, before)  # nothing moves before apply
        apply(found, slots, delta)
        check_table(slots, chosen)
        kept = [c for c in before.tolist() if c in chosen]
        assert all(before.tolist().index(c) == int(slots.slot_of_chunk_n[c]) for c in kept)  # what stays does not move
        write_table(found, slots, table, n_tokens, chunk_tokens=32, slots_per_chunk=2)
        expected = [2 * int(slots.slot_of_chunk_n[c]) + part for c in chosen for part in (0, 1)]
        assert table[: 2 * len(chosen)].tolist() == expected
        assert int(n_tokens) == 32 * len(chosen)


def test_random_changes_and_twenty_equal_runs():
    n, S = 200, 190
    slots, delta = empty_slots(n, S, DEVICE), empty_delta(S, S, DEVICE)
    found = empty_selection(n, S, DEVICE)
    lists = []
    for step in range(20):
        chosen = torch.randperm(n, generator=generator(step // 2))[: 20 * (step // 2) + 1].sort().values.tolist()
        logits = torch.full((2, n), -1.0, device=DEVICE)
        logits[step % 2, chosen] = 0.5
        select(logits, threshold(0.5), found)
        diff(found, slots, delta)
        assert int(delta.n_missing) <= int(delta.n_free)
        if step % 2:
            assert int(delta.n_missing) == 0
        apply(found, slots, delta)
        check_table(slots, chosen)
        lists.append(listed(found.chunks_K, found.n))
    assert all(lists[i] == lists[i + 1] for i in range(0, 20, 2))


def test_wrong_calls_are_refused():
    found = empty_selection(10, 10, DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        select(torch.zeros(1, 9, device=DEVICE), threshold(0.0), found)
    with pytest.raises(ValueError, match="threshold must be"):
        select(torch.zeros(1, 10, device=DEVICE), torch.zeros(2, device=DEVICE), found)
    with pytest.raises(ValueError, match="does not fit 9 slots"):
        diff(found, empty_slots(10, 9, DEVICE), empty_delta(10, 9, DEVICE))
    with pytest.raises(ValueError, match="room for"):
        diff(found, empty_slots(10, 12, DEVICE), empty_delta(10, 11, DEVICE))
    with pytest.raises(ValueError, match="a table of 11"):
        diff(found, empty_slots(11, 12, DEVICE), empty_delta(10, 12, DEVICE))
    with pytest.raises(ValueError, match="needs a table"):
        write_table(found, empty_slots(10, 12, DEVICE), found.n, found.n, chunk_tokens=4)
    with pytest.raises(ValueError, match="at most"):
        empty_selection(64 * 4096 + 1, 10, DEVICE)


def test_the_reference_keeps_the_same_tables():
    """What runs on a CPU writes what the kernels write, list for list, over sets that grow, churn and empty."""
    n, S, per_chunk = 150, 40, 3
    theirs, ours = (empty_slots(n, S, DEVICE) for _ in range(2))
    deltas = [empty_delta(S, S, DEVICE) for _ in range(2)]
    tables = [torch.zeros(S * per_chunk, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    counts = [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for step, size in enumerate([5, 40, 40, 0, 17, 40]):
        chosen = torch.randperm(n, generator=generator(step))[:size].sort().values.to(DEVICE)
        found = empty_selection(n, S, DEVICE)
        reference.fill_selection(found, chosen)
        diff(found, theirs, deltas[0])
        reference.fill_delta(found, ours, deltas[1])
        for name in ("missing_K", "free_S"):
            count = "n_" + name.split("_")[0]
            assert listed(getattr(deltas[0], name), getattr(deltas[0], count)) == listed(
                getattr(deltas[1], name), getattr(deltas[1], count)
            )
        apply(found, theirs, deltas[0])
        reference.apply_reference(found, ours, deltas[1])
        assert torch.equal(theirs.slot_of_chunk_n, ours.slot_of_chunk_n)
        assert torch.equal(theirs.chunk_of_slot_S, ours.chunk_of_slot_S)
        options = {"chunk_tokens": 7, "slots_per_chunk": per_chunk}
        write_table(found, theirs, tables[0], counts[0], **options)
        reference.write_table_reference(found, ours, tables[1], counts[1], **options)
        assert counts[0].tolist() == counts[1].tolist() == [7 * size]
        assert torch.equal(tables[0][: size * per_chunk], tables[1][: size * per_chunk])
